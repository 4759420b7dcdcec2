"""The model as a CPU runs it fastest: fused, pre-packed weights and no module calls.

A token of a small model costs more in calls than in arithmetic, so `PackedRunner` makes as few
calls as it can: q, k and v come from one product; residual, SiLU and gate are part of products;
the gain of a norm is multiplied into the matrix behind it; the two halves of a rotary pair are
stored side by side so that a rotation is one complex product. Weights are float32, bfloat16 or
int8 (`engine.linears`).
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
from fledge.engine.runner import DECODE_BUCKET, Runner
from fledge.model import Transformer
from fledge.model.attention import attend
from fledge.model.kv_cache import Piece
from fledge.model.transformer import Block, Decoder


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
    """Attention within a padded batch [B, T] that starts at position 0 and is not kept."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            x.reshape(self.batch, -1, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v)
        )
        return attend(q, k, v, None).transpose(1, 2).reshape(q.shape[0] * q.shape[2], -1)


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
        self, model: Transformer, *, deterministic: bool, weights: str = "float32"
    ) -> None:
        super().__init__(model, deterministic=deterministic)
        self.weights = weights
        self.config = model.config
        pairs = torch.complex(model.cos, model.sin)  # [positions, K/2]
        self._turns = pairs[:, None]
        self._eps = torch.tensor(model.config.rms_norm_eps)
        self.weights_changed()

    @torch.inference_mode()
    def weights_changed(self) -> None:
        """Packs the module's weights as they are now."""
        model, c = self.model.model, self.config
        assert isinstance(model, Decoder)
        order = torch.arange(c.head_dim).view(2, -1).T.flatten()  # 0, K/2, 1, K/2 + 1, ...
        self._layers = []
        for block in model.layers:
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            qk = torch.cat((attention.q_proj.weight, attention.k_proj.weight))
            qk = qk.view(-1, c.head_dim, c.hidden_size)[:, order].flatten(0, 1)
            qkv = torch.cat((qk, attention.v_proj.weight)) * block.input_layernorm.weight
            gain_in = block.post_attention_layernorm.weight
            gain = torch.cat(
                (
                    attention.q_norm.weight[order].expand(c.num_attention_heads, -1),
                    attention.k_norm.weight[order].expand(c.num_key_value_heads, -1),
                )
            )
            self._layers.append(
                PackedLayer(
                    pack(qkv, self.weights),
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
        return self._pass(ids.flatten().tolist(), positions, _Fresh(batch), None).view(
            batch, tokens, -1
        )

    def head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)

    def _pass(
        self, tokens: list[int], positions: list[int], plan: Plan, total: int | None
    ) -> Tensor:
        """Normed states [N, D] of a flat batch, padded to `total` rows."""
        c = self.config
        used, padding = len(tokens), (total or len(tokens)) - len(tokens)
        ids = torch.tensor(tokens + [0] * padding)
        turns = self._turns[torch.tensor(positions + [0] * padding)]  # [N, 1, K/2]
        heads, kv_heads, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        split = (heads + kv_heads) * size
        x = F.embedding(ids, self._embedding)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(x))
            qk = self._normed(qkv[:, :split].view(-1, heads + kv_heads, size)).mul_(layer.qk_gain)
            qk = torch.view_as_complex(qk.view(-1, heads + kv_heads, size // 2, 2)).mul_(turns)
            qk = torch.view_as_real(qk).flatten(2)
            v = qkv[:, split:].view(-1, kv_heads, size)
            y = plan.attend(index, qk[:, :heads], qk[:, heads:], v)
            if len(y) < len(x):
                y = F.pad(y, (0, 0, 0, len(x) - used))
            x = layer.out.plus(y, x)
            x = layer.feed_forward.plus(self._normed(x), x)
        return self._normed(x).mul_(self._norm)

    def _normed(self, x: Tensor) -> Tensor:
        """x over its root mean square, gain left out: three small calls, not RMSNorm's six."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
