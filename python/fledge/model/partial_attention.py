"""Attention over a part of the keys, and the merge of such parts into the whole.

softmax over a union of key sets is the average of the softmaxes over the sets, weighted by
exp(log-sum-exp) of each: so a shared prefix can be attended for many rows at once and the rest of
each row on its own. Used by `model.kv_cache` and `engine.packed`. Shapes: B batch, T queries,
H heads, K head_dim, L keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Partial = tuple[Tensor, Tensor]  # output [B, T, H, K], log-sum-exp [B, T, H]


def attend_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Partial:
    """Attention of q [B, H, T, K] over k, v [B, H_kv, L, K], and its log-sum-exp.

    `scale` of the scores: 1 / sqrt(K) where it is not given.

    Query t stands `offset` + t places after the first key; it sees the keys up to itself and, with
    a window, not those `window` or more before itself. Every query must see at least one key
    unless a window hides all of them: then its log-sum-exp is -inf and its output is 0.
    """
    tokens, length = q.shape[2], k.shape[2]
    mask = None
    hidden_ahead = offset < length - 1
    hidden_behind = window is not None and offset + tokens - 1 >= window
    causal = hidden_ahead and offset == 0 and tokens == length and not hidden_behind
    if not causal and (hidden_ahead or hidden_behind) and tokens * length > 1:
        query = torch.arange(tokens, device=q.device)[:, None] + offset
        key = torch.arange(length, device=q.device)
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        mask = torch.zeros(tokens, length, dtype=q.dtype, device=q.device)
        mask = mask.masked_fill_(~visible, float("-inf"))
    if q.device.type == "cpu" and (window is None or not hidden_behind):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k.to(q.dtype), v.to(q.dtype), is_causal=causal, attn_mask=mask, scale=scale
        )
        return output.transpose(1, 2), lse.transpose(1, 2)
    return naive_partial(q, k, v, mask=mask, causal=causal, scale=scale)


def naive_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    causal: bool = False,
    scale: float | None = None,
) -> Partial:
    """The readable twin, and what other devices use: mask [T, L] is added to the scores."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        mask = torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)  # a row that sees nothing: 0
    return (weights.to(v.dtype) @ v).transpose(1, 2), lse.transpose(1, 2)


def merge_partials(parts: list[Partial]) -> Tensor:
    """The attention output [B, T, H, K] over the union of the parts' keys."""
    if len(parts) == 1:
        return parts[0][0]
    if len(parts) == 2:  # exp(a) / (exp(a) + exp(b)) = sigmoid(a - b)
        (first, a), (second, b) = parts
        return torch.lerp(second, first, torch.sigmoid(a - b)[..., None].to(first.dtype))
    weights = torch.stack([lse for _, lse in parts]).softmax(dim=0)[..., None]
    outputs = torch.stack([output for output, _ in parts])
    return (outputs * weights.to(outputs.dtype)).sum(dim=0)
