"""How one pass attends over the cache: which kernel calls, worked out once and used by every layer.

A pass over a small model is mostly overhead, so what does not depend on the layer (slices, masks,
places to write) is made before the first layer. `DecodePlan` serves passes with one token a row:
rows in neighbouring slots share a call, and a segment that several rows read is read once for all
of them. `PiecePlan` serves prompts. Used by `engine.packed`; `model.kv_cache.CacheView` is the
readable twin, and tests hold the two equal. CPU only: the kernel is torch's flash attention for
CPUs, which also gives the log-sum-exp that merging needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.model.kv_cache import KVCache, Piece, Segment
from fledge.model.partial_attention import attend_partial, merge_partials

LENGTH_BUCKET = 128  # rows in one call differ in length by less than this
PRODUCTS_FROM = 2**18  # numbers in the keys of a call
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Places:
    """Where the new keys and values of a pass go, as rows of the flattened cache."""

    def __init__(self, cache: KVCache, pieces: list[Piece]) -> None:
        self.cache = cache
        self.heads = cache.keys[0].shape[1]
        self.positions = [p for piece in pieces for p in range(piece.start, piece.end)]
        self.used = len(self.positions)
        if self.used == len(pieces):  # one token each: a short list is made faster than tensors
            heads, length = range(self.heads), cache.max_len
            first = [piece.slot * self.heads * length + piece.start for piece in pieces]
            self._index = torch.tensor([f + h * length for f in first for h in heads])
            return
        slots = [piece.slot for piece in pieces for _ in range(piece.count)]
        lines = torch.tensor(slots)[:, None] * self.heads + torch.arange(self.heads)  # [N, H_kv]
        self._index = (lines * cache.max_len + torch.tensor(self.positions)[:, None]).flatten()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores k and v [N, H_kv, K]; what is behind the used rows is padding."""
        size = k.shape[-1]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        k, v = k[: self.used].reshape(-1, size), v[: self.used].reshape(-1, size)
        keys.view(-1, size).index_copy_(0, self._index, k.to(keys.dtype))
        values.view(-1, size).index_copy_(0, self._index, v.to(values.dtype))


class PiecePlan:
    """Attention of a flat batch of prompts, piece by piece."""

    def __init__(self, cache: KVCache, pieces: list[Piece]) -> None:
        self.places = Places(cache, pieces)
        self._pieces = pieces

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [N, H*K] of q [N, H, K] after storing k, v [N, H_kv, K]."""
        self.places.write(layer, k, v)
        cache, outputs, at = self.places.cache, [], 0
        keys, values = cache.keys[layer], cache.values[layer]
        for piece in self._pieces:
            mine = q[None, at : at + piece.count].transpose(1, 2)  # [1, H, T, K]
            parts = []
            for part in (*piece.segments, Segment(piece.slot, piece.base, piece.end)):
                k_part = keys[part.slot, None, :, part.start : part.end]
                v_part = values[part.slot, None, :, part.start : part.end]
                parts.append(attend_partial(mine, k_part, v_part, piece.start - part.start))
            outputs.append(merge_partials(parts)[0].flatten(1))
            at += piece.count
        if at < len(q):
            outputs.append(q.new_zeros(len(q) - at, outputs[0].shape[1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention [R, H_kv, g, K] of q [R, H_kv, g, K] over k, v [R, H_kv, L, K], and its scores'
    log-sum-exp [R, H_kv, g] if wanted.

    Keys times query reads memory 1.5 to 2 times as fast as the flash kernel, whose product of one
    query with many keys is the slow direction of the matrix library (docs/log.md). Nor do the bits
    of a row depend on the number of rows, as the kernel's do when threads share them.
    """
    rows = len(q)
    if rows * q.shape[1] == 1:  # a single matrix goes through another kernel, of other bits
        q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k, v))
        mask = mask.expand(2, -1, -1, -1) if mask is not None else None
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(k, (q * shape[-1] ** -0.5).transpose(1, 2)).transpose(1, 2)  # [R H, g, L]
    if mask is not None:
        scores = (scores.unflatten(0, shape[:2]) + mask).flatten(0, 1)
    output = torch.bmm(scores.softmax(dim=-1), v).view(shape)[:rows]
    return output, scores.logsumexp(dim=-1).view(shape[:3])[:rows] if want_lse else None


@dataclass(frozen=True)
class _Run:
    """Rows of a pass whose own slots stand side by side: one call."""

    rows: slice
    slots: slice
    start: int
    end: int
    mask: Tensor | None  # [rows, 1, 1, end - start], added to the scores
    by_products: bool  # much to read, or bits that must not depend on the other rows


@dataclass(frozen=True)
class _Shared:
    """Rows that read one segment: one call with all their queries."""

    rows: slice | Tensor
    count: int
    segment: Segment


class DecodePlan:
    """Attention of a pass with one token a row."""

    def __init__(self, cache: KVCache, pieces: list[Piece], *, deterministic: bool) -> None:
        self.places = Places(cache, pieces)
        self._deterministic = deterministic
        self._runs = [self._run(pieces, i, j) for i, j in self._split(pieces)]
        # the n-th segments of all rows; rows without one do not take part
        depth = max(len(piece.segments) for piece in pieces)
        self._shared = [self._groups(pieces, level) for level in range(depth)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [N, H*K] of q [N, H, K] after storing k, v [N, H_kv, K]."""
        self.places.write(layer, k, v)
        cache = self.places.cache
        keys, values = cache.keys[layer], cache.values[layer]
        rows, kv_heads, size = self.places.used, keys.shape[1], q.shape[-1]
        # the query heads of one key head are its queries: the keys are read once for all of them
        q = q[:rows].view(rows, kv_heads, -1, size)
        outputs, norms = [], []
        for run in self._runs:
            k_run = keys[run.slots, :, run.start : run.end]
            v_run = values[run.slots, :, run.start : run.end]
            if run.by_products:
                want = bool(self._shared)
                part = _attend_by_products(q[run.rows], k_run, v_run, run.mask, want_lse=want)
            else:
                part = _flash(q[run.rows], k_run, v_run, attn_mask=run.mask)
            outputs.append(part[0])
            norms.append(part[1])
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [N, H_kv, g, K]
        if self._shared:
            lse = norms[0] if len(norms) == 1 else torch.cat(norms)
            for groups in self._shared:
                output, lse = self._merge(groups, q, keys, values, output, lse)
        return output.reshape(rows, -1)

    def _merge(
        self,
        groups: list[_Shared],
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`output` and `lse` with one more level of segments taken in."""
        rows, kv_heads, per_head, size = q.shape
        for group in groups:
            s = group.segment
            mine = q[group.rows].transpose(0, 1).reshape(1, kv_heads, -1, size)
            more, more_lse = _flash(
                mine,
                keys[s.slot, None, :, s.start : s.end],
                values[s.slot, None, :, s.start : s.end],
            )
            shape = (kv_heads, group.count, per_head)
            more = more[0].reshape(*shape, size).transpose(0, 1)
            more_lse = more_lse[0].reshape(shape).transpose(0, 1)
            everyone = group.count == rows
            old, old_lse = (output, lse) if everyone else (output[group.rows], lse[group.rows])
            merged = torch.lerp(old, more, torch.sigmoid(more_lse - old_lse)[..., None])
            merged_lse = torch.logaddexp(old_lse, more_lse)
            if everyone:
                output, lse = merged, merged_lse
            else:
                output[group.rows], lse[group.rows] = merged, merged_lse
        return output, lse

    def _split(self, pieces: list[Piece]) -> list[tuple[int, int]]:
        """Ranges of rows that one call serves: neighbouring slots, like lengths, equal bases.

        Deterministic: always the same number of keys for a length, so that a row's result does
        not depend on its neighbours.
        """
        ranges, first = [], 0
        for i in range(1, len(pieces) + 1):
            if i < len(pieces):
                a, b = pieces[i - 1], pieces[i]
                alike = a.end // LENGTH_BUCKET == b.end // LENGTH_BUCKET and a.base == b.base
                if alike and b.slot == a.slot + 1:
                    continue
            ranges.append((first, i))
            first = i
        return ranges

    def _run(self, pieces: list[Piece], i: int, j: int) -> _Run:
        cache, ends = self.places.cache, [piece.end for piece in pieces[i:j]]
        first, end = pieces[i], max(ends)
        if self._deterministic:
            end = min((end // LENGTH_BUCKET + 1) * LENGTH_BUCKET, cache.max_len)
        mask = None
        if self._deterministic or min(ends) < end:
            for piece in pieces[i:j]:
                cache.make_finite(piece.slot, piece.base, piece.end, end)
            place = torch.arange(first.base, end)
            hidden = place >= torch.tensor(ends)[:, None]
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]
        slots = slice(first.slot, first.slot + j - i)
        heads, size = cache.keys[0].shape[1], cache.keys[0].shape[3]
        much = (j - i) * heads * (end - first.base) * size >= PRODUCTS_FROM
        return _Run(slice(i, j), slots, first.base, end, mask, much or self._deterministic)

    def _groups(self, pieces: list[Piece], level: int) -> list[_Shared]:
        found: dict[tuple[Segment, int], list[int]] = {}
        for i, piece in enumerate(pieces):
            if level < len(piece.segments):
                key = i if self._deterministic else -1  # a row's result is its own affair
                found.setdefault((piece.segments[level], key), []).append(i)
        groups = []
        for (segment, _), rows in found.items():
            side_by_side = rows[-1] - rows[0] == len(rows) - 1
            where = slice(rows[0], rows[-1] + 1) if side_by_side else torch.tensor(rows)
            groups.append(_Shared(where, len(rows), segment))
        return groups
