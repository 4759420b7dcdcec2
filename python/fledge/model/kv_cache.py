"""Keys and values of the tokens already read: one contiguous slot per sequence.

Used by `engine`, which says through a `CacheView` where a flat batch of tokens stands; the layers
of `model.attention` hand their queries, keys and values to the view. K and V of a layer are
[slots, H_kv, max_len, K], allocated once and never moved; position p of a sequence stands at place
p of its slot. A sequence may begin in the slots of others (`Piece.segments`): a prompt that many
rows share is stored once and read once a step, and the partial softmaxes are merged by their
log-sum-exp (the split of FlashDecoding and of cascade inference: Dao et al. 2023, Ye et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fledge.config import ModelConfig
from fledge.model.partial_attention import attend_partial, merge_partials

FINITE_STRETCH = 128  # tokens


class KVCache:
    """`slots` sequences of up to `max_len` tokens each."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_len: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (slots, config.num_key_value_heads, max_len, config.head_dim)
        layers = range(config.num_hidden_layers)
        # untouched memory costs nothing on a CPU: pages come with the first write
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.ids = torch.zeros(slots, max_len, dtype=torch.long, device=device)
        self.max_len = max_len
        self._finite = [(0, 0)] * slots  # of each slot: from where to where all is known finite

    @property
    def slots(self) -> int:
        return self.keys[0].shape[0]

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copies the tokens at start..end-1 of one slot into another."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target, :, start:end] = tensor[source, :, start:end]
        self.ids[target, start:end] = self.ids[source, start:end]

    def poison(self, slot: int, *, start: int) -> None:
        """Fills a slot with NaN from `start` on: a test then sees who reads what is not his."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[slot, :, start:] = float("nan")
        self._finite[slot] = (0, 0)

    def make_finite(self, slot: int, base: int, written: int, end: int) -> None:
        """Lets a masked call read places base..end-1 of a slot whose row has `written` tokens.

        0 x NaN is NaN: what a mask hides must still be a number. So the places behind the row's
        own tokens are set to 0 once, a stretch at a time, before anybody reads over them.
        """
        low, high = self._finite[slot]
        if low > base or not low <= written <= high:
            low, high = base, written
        if end > high:
            upto = min(self.max_len, end + FINITE_STRETCH)
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[slot, :, high:upto] = 0
            high = upto
        self._finite[slot] = (low, high)


@dataclass(frozen=True)
class Segment:
    """Positions start..end-1 of a sequence, stored at those places of `slot`; read only."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Piece:
    """Tokens start..start+count-1 of one sequence in a flat batch.

    Earlier positions: first the `segments` in order, the rest from `base` on in the own `slot`.
    """

    slot: int
    start: int
    count: int
    segments: tuple[Segment, ...] = ()

    @property
    def base(self) -> int:
        return self.segments[-1].end if self.segments else 0

    @property
    def end(self) -> int:
        return self.start + self.count


class AttentionView(Protocol):
    """Where tokens stand that are not simply rows from position 0, and what they see.

    `positions` are those of the ids that `Transformer.hidden` is given, in their shape.
    """

    positions: Tensor

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention output [B, T, H, K] of q [B, H, T, K]; k, v [B, H_kv, T, K] are the tokens'."""
        ...

    def previous_ids(self, ids: Tensor) -> Tensor:
        """The token before each of ids in its own sequence; 0 where there is none."""
        ...


class CacheView:
    """Where the tokens of one flat batch [1, N] stand, and their attention over the cache.

    Tokens of a piece stand side by side, pieces in order; what follows the last piece is padding,
    computed and ignored. `window` of `attend` limits a layer to the newest positions.
    """

    def __init__(self, cache: KVCache, pieces: list[Piece], total: int | None = None) -> None:
        self.cache = cache
        self.pieces = pieces
        places = [p for piece in pieces for p in range(piece.start, piece.end)]
        slots = [piece.slot for piece in pieces for _ in range(piece.count)]
        self.used = len(places)
        places += [0] * ((total or self.used) - self.used)
        device = cache.keys[0].device
        self.positions = torch.tensor([places], device=device)  # [1, N]
        self._slots = torch.tensor(slots, device=device)

    def previous_ids(self, ids: Tensor) -> Tensor:
        """The token before each of ids [1, N] in its own sequence; 0 where there is none.

        For layers that mix a token with the one before it. Stores the ids for later passes.
        """
        places = self.positions[0, : self.used]
        self.cache.ids[self._slots, places] = ids[0, : self.used]
        at, slots = 0, self._slots.clone()
        for piece in self.pieces:
            if piece.segments and piece.start == piece.base:
                slots[at] = piece.segments[-1].slot
            at += piece.count
        previous = torch.zeros_like(ids)
        found = self.cache.ids[slots, (places - 1).clamp_min(0)]
        previous[0, : self.used] = torch.where(places > 0, found, 0)
        return previous

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Stores k, v [1, H_kv, N, K] and gives the attention output [1, N, H, K] of q [1,H,N,K].

        A query sees its own sequence up to itself; with a window, the newest `window` of those.
        `scale` of the scores: 1 / sqrt(K) where it is not given.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        places = self.positions[0, : self.used]
        keys[self._slots, :, places] = k[0, :, : self.used].transpose(0, 1).to(keys.dtype)
        values[self._slots, :, places] = v[0, :, : self.used].transpose(0, 1).to(values.dtype)
        y = q.new_zeros(1, q.shape[2], q.shape[1], q.shape[3])
        at = 0
        for piece in self.pieces:
            rows = slice(at, at + piece.count)
            y[:, rows] = self._attend_piece(q[:, :, rows], keys, values, piece, window, scale)
            at += piece.count
        return y

    def _attend_piece(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        piece: Piece,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        parts = []
        own = Segment(piece.slot, piece.base, piece.end)
        for part in (*piece.segments, own):
            start = part.start
            if window is not None:  # what no query of the piece sees is not read
                start = max(start, piece.start - window + 1)
            if start >= part.end:
                continue
            k = keys[part.slot, None, :, start : part.end]
            v = values[part.slot, None, :, start : part.end]
            offset = piece.start - start
            parts.append(attend_partial(q, k, v, offset, window=window, scale=scale))
        return merge_partials(parts)
