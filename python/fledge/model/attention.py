"""Causal self-attention with grouped-query heads, QK-norm and rotary positions, as in Qwen3.

Used by `model.transformer`. One function, `attend`, does the arithmetic: through torch's SDPA, or
its flash kernel for windows where there is one; `naive_attend` is its readable twin. Shapes:
B batch, T tokens, H heads, K head_dim, L cache length.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.config import ModelConfig
from fledge.model.cpu_attention import rounded_attend, takes
from fledge.model.kv_cache import AttentionView
from fledge.model.layers import HALF, Linear, RMSNorm, rotate


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v; causal when `mask` is None. q [B,H,T,K], k and v [B,H_kv,L,K].

    window: of whole rows (L = T), query i sees keys i - window < j <= i. scale: 1 / sqrt(K) where
    it is not given.
    """
    grouped, tokens = q.shape[1] != k.shape[1], q.shape[2]
    if window is not None and tokens > window:
        assert mask is None and k.shape[2] == tokens
        kernel = window_kernel(q)
        if kernel is not None:
            return _attend_window(kernel, q, k, v, window, scale)
        mask = window_mask(tokens, window, q.device)
    causal = mask is None and tokens > 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
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


def naive_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """The readable twin of `attend`; tests hold the two equal."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if mask is None:
        mask = window_mask(q.shape[2], window or q.shape[2], q.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """[T, T] True where key j is one of the `window` last ones of query i: i - window < j <= i."""
    place = torch.arange(tokens, device=device)
    back = place[:, None] - place
    return (back >= 0) & (back < window)


def window_kernel(q: Tensor) -> Callable[..., Any] | None:
    """torch's flash attention with a window, where it runs: 16 bits on NVIDIA GPUs from Ampere on.

    It skips the keys that a window hides; SDPA with a mask computes all of them first. It came with
    torch 2.13 (`torch.nn.attention.varlen`, `window_size`); FlexAttention, which older ones have,
    is fast only when compiled, and nothing here is.
    """
    if q.device.type != "cuda" or q.dtype not in HALF or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    return _varlen()


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def _attend_window(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None
) -> Tensor:
    """The rows of a batch as sequences of one length, side by side: [B T, H, K]."""
    rows, _, tokens, _ = q.shape
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    ends = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=q.device)
    y = kernel(
        *flat,
        ends,
        ends,
        tokens,
        tokens,
        scale=scale,
        window_size=(window - 1, 0),  # keys before the query's own
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.unflatten(0, (rows, tokens)).transpose(1, 2)


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

    def rounds(self, q: Tensor) -> bool:
        """Whether attention's products are rounded like those of the layers."""
        return self.q_proj.rounds() and q.device.type == "cpu" and takes(q)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionView | None) -> Tensor:
        """What attention adds to the stream [B, T, D]; with a view, cached tokens are seen too."""
        if view is None and self.rounds(q):
            y = rounded_attend(q, k, v, 1.0 / math.sqrt(self.head_dim), None).transpose(1, 2)
        elif view is None:
            y = attend(q, k, v, None).transpose(1, 2)
        else:
            y = view.attend(self.layer, q, k, v)  # [B, T, H, K]
        return self.o_proj(y.flatten(2))
