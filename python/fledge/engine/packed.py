"""The model as a CPU runs it fastest: fused, pre-packed weights and no module calls.

A token of a small model costs more in calls than in arithmetic, so `PackedRunner` makes as few
calls as it can: q, k and v come from one product; residual, SiLU and gate are part of products;
the gain of a norm is multiplied into the matrix behind it; the two halves of a rotary pair are
stored side by side so that a rotation is one complex product. Weights are float32, bfloat16 or
int8 (`engine.linears`).
Decode steps go through `engine.native`, one call of Rust for all layers, where that is there and
faster.
The readable twin is `engine.runner.Runner`; tests hold the two equal. Used by `engine.engine` for
qwen3 on CPUs. Never changes the model; after an optimizer step it packs again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.engine.attention_plan import DecodePlan, PiecePlan
from fledge.engine.linears import Linear, SwiGLU, pack, pack_swiglu
from fledge.engine.native import NativeDecoder, can_step
from fledge.engine.runner import DECODE_BUCKET, MaskedView, Runner
from fledge.model import Transformer
from fledge.model.attention import attend, attend_in_blocks
from fledge.model.kv_cache import AttentionView, Piece
from fledge.model.transformer import Block, Decoder

NATIVE_THREADS = 16  # at most: the matrices of small models have no work for more


class Plan(Protocol):
    """Stores new keys and values and attends: q [N, H, K], k and v [N, H_kv, K] -> [N, H*K]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PackedLayer:
    """One block: `qk_gain` [H + H_kv, K] is what is left of the norms."""

    qkv: Linear
    out: Linear
    feed_forward: SwiGLU
    qk_gain: Tensor


class _Fresh:
    """Attention within a padded batch [B, T] that is not kept: causal from position 0, or as a
    view has it."""

    def __init__(self, batch: int, width: int, view: AttentionView | None = None) -> None:
        self.batch = batch
        self.view = view
        if view is None:
            seen = torch.ones(width, width, dtype=torch.bool).tril_()
            self.mask = torch.zeros(width, width).masked_fill_(~seen, float("-inf"))[None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            x.reshape(self.batch, -1, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v)
        )
        if self.view is None:
            y = attend_in_blocks(q, k, v, self.mask)
        else:
            y = self.view.attend(layer, q, k, v)
        return y.reshape(q.shape[0] * q.shape[2], -1)


class ScoredPlaces:
    """The queries of a few places [P] (ascending, of B x T), side by side for each row of a batch.

    Used for the last layer of a scoring pass, where nobody asks for the other queries.
    """

    def __init__(self, places: Tensor, batch: int, width: int, seen: Tensor | None) -> None:
        """seen [B, 1, T, T]: who sees whom; None: every token those before it."""
        self.places = places
        self.batch = batch
        row, at = places // width, places % width
        counts = torch.bincount(row, minlength=batch)
        self.most = int(counts.max())
        # where each place stands in [B, most]
        self.slots = row * self.most + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        query = torch.zeros(batch * self.most, dtype=torch.long)
        query[self.slots] = at
        query = query.view(batch, self.most)
        if seen is None:
            mask = torch.arange(width) <= query[..., None]
        else:
            mask = seen[:, 0].gather(1, query[..., None].expand(-1, -1, width))
        self.mask = mask[:, None]  # [B, 1, most, T]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [P, H*K] of q [P, H, K] over all k, v [B*T, H_kv, K]."""
        rows = q.new_zeros(self.batch * self.most, *q.shape[1:])
        rows[self.slots] = q
        rows, k, v = (x.reshape(self.batch, -1, *x.shape[1:]).transpose(1, 2) for x in (rows, k, v))
        y = attend(rows, k, v, self.mask).transpose(1, 2).flatten(0, 1)
        return y[self.slots].flatten(1)


def can_pack(model: Transformer) -> bool:
    """Whether `PackedRunner` knows this model: plain qwen3 that computes in float32, on a CPU."""
    return (
        isinstance(model, Transformer)
        and model.config.arch == "qwen3"
        and model.cos.device.type == "cpu"
        and model.lm_head.weight.dtype == model.compute_dtype == torch.float32
    )


class PackedRunner(Runner):
    """Passes over packed weights of a qwen3 model on a CPU."""

    def __init__(
        self,
        model: Transformer,
        *,
        deterministic: bool,
        weights: str = "float32",
        native: bool = True,
    ) -> None:
        """`native=False`: decode steps of torch's operators, for tests."""
        super().__init__(model, deterministic=deterministic)
        self.weights = weights
        self._can_step = native and can_step(weights)
        self._threads = min(torch.get_num_threads(), NATIVE_THREADS)
        self.config = model.config
        pairs = torch.complex(model.cos, model.sin)  # [positions, K/2]
        self._turns = pairs[:, None]
        # 0, K/2, 1, K/2 + 1, ...
        self._order = torch.arange(model.config.head_dim).view(2, -1).T.flatten()
        self._eps = torch.tensor(model.config.rms_norm_eps)
        self.weights_changed()

    @torch.inference_mode()
    def weights_changed(self) -> None:
        """Packs the module's weights as they are now."""
        model, c = self.model.model, self.config
        assert isinstance(model, Decoder)
        order = self._order
        self._layers = []
        for block in model.layers:
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            gain_in = block.post_attention_layernorm.weight
            gain = torch.cat(
                (
                    attention.q_norm.weight[order].expand(c.num_attention_heads, -1),
                    attention.k_norm.weight[order].expand(c.num_key_value_heads, -1),
                )
            )
            self._layers.append(
                PackedLayer(
                    pack(self._qkv_weight(block), self.weights),
                    pack(attention.o_proj.weight, self.weights),
                    pack_swiglu(
                        mlp.gate_proj.weight * gain_in,
                        mlp.up_proj.weight * gain_in,
                        mlp.down_proj.weight,
                        self.weights,
                    ),
                    gain.contiguous(),
                )
            )
        self._embedding = model.embed_tokens.weight.detach()
        self._norm = model.norm.weight.detach()
        self._head = pack(self.model.lm_head.weight, self.weights)
        self._last: tuple[Linear, Linear] | None = None  # made when exams first ask
        self._native: NativeDecoder | None = None  # made by the first decode step

    def prefill(
        self, parts: list[list[int]], pieces: list[Piece], ends: list[int], total: int | None
    ) -> Tensor:
        last, at = [], -1
        for piece in pieces:
            at += piece.count
            last.append(at)
        plan = PiecePlan(self.cache, pieces)
        tokens = [token for part in parts for token in part]
        hidden = self._pass(tokens, plan.places.positions, plan, total)
        return self._logits(hidden, [last[i] for i in ends])

    def decode(self, tokens: list[int], pieces: list[Piece]) -> Tensor:
        if self._can_step:  # a row's bits are its own there: a deterministic engine needs no bucket
            if self._native is None:
                self._native = NativeDecoder(self.model, self.weights, threads=self._threads)
            return self._native.decode(tokens, pieces, self.cache)
        if not self.deterministic:
            plan = DecodePlan(self.cache, pieces, deterministic=False)
            return self._head(self._pass(tokens, plan.places.positions, plan, None))
        logits = []
        for first in range(0, len(pieces), DECODE_BUCKET):
            part = pieces[first : first + DECODE_BUCKET]
            plan = DecodePlan(self.cache, part, deterministic=True)
            now = tokens[first : first + DECODE_BUCKET]
            hidden = self._pass(now, plan.places.positions, plan, DECODE_BUCKET)
            logits.append(self._head(hidden)[: len(part)])
        return torch.cat(logits)

    def hidden_of(self, ids: Tensor) -> Tensor:
        batch, tokens = ids.shape
        positions = [*range(tokens)] * batch
        return self._pass(ids.flatten().tolist(), positions, _Fresh(batch, tokens), None).view(
            batch, tokens, -1
        )

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def states_at(self, ids: Tensor, view: MaskedView | None, places: Tensor) -> Tensor:
        """As the twin has it; the last layer is computed for the places alone, but for its keys
        and values: nobody reads what it makes of the other tokens."""
        c, (batch, width) = self.config, ids.shape
        flat, plan = ids.flatten(), _Fresh(batch, width, view)
        positions = torch.arange(width).repeat(batch) if view is None else view.positions.flatten()
        turns = self._turns[positions]
        if 2 * len(places) > len(flat):  # most are asked for
            x = self._blocks(flat, turns, plan, self._layers, len(flat))
            return self._normed(x[places]).mul_(self._norm)
        x = self._blocks(flat, turns, plan, self._layers[:-1], len(flat))
        scored = ScoredPlaces(places, batch, width, None if view is None else view.mask)
        heads, size, layer = c.num_attention_heads, c.head_dim, self._layers[-1]
        normed = self._normed(x)
        queries, keys_values = self._last_parts()
        q = queries(normed[places]).view(-1, heads, size)
        k, v = keys_values(normed).view(-1, 2, c.num_key_value_heads, size).unbind(1)
        q = self._turned(q, layer.qk_gain[:heads], turns[places])
        k = self._turned(k, layer.qk_gain[heads:], turns)
        x = layer.out.plus(scored.attend(q, k, v), x[places])
        x = layer.feed_forward.plus(self._normed(x), x)
        return self._normed(x).mul_(self._norm)

    def _last_parts(self) -> tuple[Linear, Linear]:
        """The last layer's queries, and its keys and values, by themselves: of a scoring pass."""
        if self._last is None:
            decoder, split = (
                self.model.model,
                self.config.num_attention_heads * self.config.head_dim,
            )
            weight = self._qkv_weight(decoder.layers[-1])
            self._last = pack(weight[:split], self.weights), pack(weight[split:], self.weights)
        return self._last

    def _qkv_weight(self, block: torch.nn.Module) -> Tensor:
        """Of queries, keys and values, the norm's gain in it, pairs of a rotation side by side."""
        assert isinstance(block, Block)
        attention, size = block.self_attn, self.config.head_dim
        qk = torch.cat((attention.q_proj.weight, attention.k_proj.weight))
        qk = qk.view(-1, size, self.config.hidden_size)[:, self._order].flatten(0, 1)
        return torch.cat((qk, attention.v_proj.weight)) * block.input_layernorm.weight

    def _pass(
        self, tokens: list[int], positions: list[int], plan: Plan, total: int | None
    ) -> Tensor:
        """Normed states [N, D] of a flat batch, padded to `total` rows."""
        used, padding = len(tokens), (total or len(tokens)) - len(tokens)
        ids = torch.tensor(tokens + [0] * padding)
        turns = self._turns[torch.tensor(positions + [0] * padding)]  # [N, 1, K/2]
        x = self._blocks(ids, turns, plan, self._layers, used)
        return self._normed(x).mul_(self._norm)

    def _blocks(
        self, ids: Tensor, turns: Tensor, plan: Plan, layers: list[PackedLayer], used: int
    ) -> Tensor:
        """The stream [N, D] behind the first layers, of which `used` rows are no padding."""
        c = self.config
        heads, kv_heads, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        split = (heads + kv_heads) * size
        x = F.embedding(ids, self._embedding)
        for index, layer in enumerate(layers):
            qkv = layer.qkv(self._normed(x))
            qk = self._turned(qkv[:, :split].view(-1, heads + kv_heads, size), layer.qk_gain, turns)
            v = qkv[:, split:].view(-1, kv_heads, size)
            y = plan.attend(index, qk[:, :heads], qk[:, heads:], v)
            if len(y) < len(x):
                y = F.pad(y, (0, 0, 0, len(x) - used))
            x = layer.out.plus(y, x)
            x = layer.feed_forward.plus(self._normed(x), x)
        return x

    def _turned(self, heads: Tensor, gain: Tensor, turns: Tensor) -> Tensor:
        """Queries or keys [N, H, K], normed and rotated to their positions."""
        heads = self._normed(heads).mul_(gain)
        pairs = torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2)).mul_(turns)
        return torch.view_as_real(pairs).flatten(2)

    def _normed(self, x: Tensor) -> Tensor:
        """x over its root mean square, gain left out: three small calls, not RMSNorm's six."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
