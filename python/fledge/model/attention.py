"""Causal self-attention with grouped-query heads, QK-norm and rotary positions, as in Qwen3.

Used by `model.transformer`. One function, `attend`, does the arithmetic through torch's SDPA;
`naive_attend` is its readable twin. Shapes: B batch, T tokens, H heads, K head_dim, L cache length.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.config import ModelConfig
from fledge.model.kv_cache import AttentionView
from fledge.model.layers import Linear, RMSNorm, rotate


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v; causal when `mask` is None. q [B,H,T,K], k and v [B,H_kv,L,K]."""
    grouped = q.shape[1] != k.shape[1]
    causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


QUERY_BLOCK = 64


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> Tensor:
    """The same on a CPU for tokens of which none sees one behind it: [B, T, H, K].

    mask [B or 1, 1, T, T]. A call for every QUERY_BLOCK queries leaves out the keys behind them.
    torch's kernel for CPUs looks at all of them below 512 tokens, causal or not: 1.4 to 1.7 times
    the time at 255 and 407 tokens (docs/log.md).
    """
    grouped, parts = q.shape[1] != k.shape[1], []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, q.shape[2])
        y = F.scaled_dot_product_attention(
            q[:, :, start:end],
            k[:, :, :end],
            v[:, :, :end],
            attn_mask=mask[:, :, start:end, :end],
            scale=scale,
            enable_gqa=grouped,
        )
        parts.append(y.transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def naive_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The readable twin of `attend`; tests hold the two equal."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


class Attention(nn.Module):
    """Multi-head attention of one layer (parameter names of Hugging Face's Qwen3)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: AttentionView | None) -> Tensor:
        return self.mix(*self.project(x, cos, sin), view)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, H_kv, T, K] of the normed stream [B, T, D]."""
        heads = (x.shape[0], x.shape[1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionView | None) -> Tensor:
        """What attention adds to the stream [B, T, D]; with a view, cached tokens are seen too."""
        if view is None:
            y = attend(q, k, v, None).transpose(1, 2)
        else:
            y = view.attend(self.layer, q, k, v)  # [B, T, H, K]
        return self.o_proj(y.flatten(2))
