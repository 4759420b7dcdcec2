"""Causal attention of whole rows for training on a CPU, its products of bfloat16 numbers.

torch's own kernel for CPUs multiplies small float32 blocks. On a processor that is fast in bfloat16
(`precision`: bfloat16_products) a third of its time is saved (docs/log.md) by plain batched
products of one row's heads at a time, so that their scores stay in the cache, and by keeping the
probabilities, in bfloat16, for the backward pass. Used by `model.attention` and `model.extras`
while gradients are wanted; `naive_attend` there is the readable twin. Shapes: B batch, H heads,
T tokens, K head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # queries at a time: what lies wholly behind the diagonal is not computed
MOST_TOKENS = 1024
"""Of a row: the probabilities that are kept grow with its square (H T^2 bytes at most)."""


def takes(q: Tensor) -> bool:
    """Whether rows of this length go this way."""
    return 1 < q.shape[2] <= MOST_TOKENS


def rounded_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(scale q k^T) v [B, H, T, K], causal, within `window` tokens (None = all before).

    q [B, H, T, K], k and v [B, H_kv, T, K], float32; so is what comes out. Differentiable.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return _Attend.apply(q, k, v, scale, window)  # type: ignore[return-value]


def _blocks(tokens: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of the queries, first key that any of them sees) of each block."""
    starts = range(0, tokens, BLOCK)
    return [
        (start, min(tokens, start + BLOCK), 0 if window is None else max(0, start - window + 1))
        for start in starts
    ]


def _hidden(start: int, end: int, first: int, window: int | None) -> Tensor:
    """[queries, keys] -inf where the query must not look, else 0; the block's keys from `first`."""
    back = torch.arange(start, end)[:, None] - torch.arange(first, end)
    seen = back >= 0
    if window is not None:
        seen &= back < window
    return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, float("-inf"))


class _Attend(torch.autograd.Function):
    """One row of the batch and one block of queries at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
    ) -> Tensor:
        batch, heads, tokens, size = q.shape
        y = q.new_empty(batch, tokens, heads, size).transpose(1, 2)
        q, k, v = (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()
        kept = []
        for start, end, first in _blocks(tokens, window):
            hidden = _hidden(start, end, first, window)
            for row in range(batch):
                scores = (q[row, :, start:end] @ k[row, :, first:end].mT).add_(hidden)
                shares = scores.softmax(-1, dtype=torch.float32).bfloat16()
                y[row, :, start:end] = shares @ v[row, :, first:end]
                kept.append(shares)
        ctx.save_for_backward(q, k, v, y, *kept)
        ctx.scale, ctx.window = scale, window
        return y

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        q, k, v, y, *kept = ctx.saved_tensors
        batch, heads, tokens, size = q.shape
        along = (upstream * y).sum(-1, keepdim=True)
        slope = upstream.bfloat16()
        grads = [y.new_zeros(batch, tokens, heads, size).transpose(1, 2) for _ in range(3)]
        grad_q, grad_k, grad_v = grads
        shares_of = iter(kept)
        for start, end, first in _blocks(tokens, ctx.window):
            for row in range(batch):
                shares = next(shares_of)
                part = slope[row, :, start:end]
                grad_v[row, :, first:end] += shares.mT @ part
                by_score = (part @ v[row, :, first:end].mT).float()
                by_score = by_score.sub_(along[row, :, start:end]).mul_(shares).bfloat16()
                grad_q[row, :, start:end] = by_score @ k[row, :, first:end]
                grad_k[row, :, first:end] += by_score.mT @ q[row, :, start:end]
        return grad_q.mul_(ctx.scale), grad_k, grad_v, None, None
