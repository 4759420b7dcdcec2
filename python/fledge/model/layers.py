"""The position-wise parts of a block: RMSNorm, rotary positions, SwiGLU, and the chunked loss.

Used by `model.transformer` and `model.attention`. Shapes: B batch, T tokens, D hidden, H heads,
K head_dim, V vocab, N = B*T rows. Nothing here keeps state between calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSS_CHUNK_ROWS = 1024  # rows of logits alive at once: 1024 x 4096 x 4 bytes = 16 MiB


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SwiGLU(nn.Module):
    """Feed-forward layer down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and frequency, [positions, K/2] (Su et al., arXiv 2104.09864).

    Computed in float64 so that long contexts keep their phase, stored in float32.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the last dimension of x [B, H, T, K] by the angles [.., T, K/2].

    Pairs dimension i with i + K/2, as Hugging Face's Qwen3 and Llama do.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_n weight_n * -log softmax(x_n W^T)[target_n], gradients made in the forward pass.

    Never holds more than LOSS_CHUNK_ROWS rows of logits: at a small depth the logits are by far
    the largest tensor of a step, and touching them once is the cheapest way to get both results.
    Rows of weight 0 (most of a batch of chats) never meet the head.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        need_x, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        all_rows, kept = x, weights.nonzero().squeeze(1)
        if len(kept) < len(x):
            x, targets, weights = x[kept], targets[kept], weights[kept]
        grad_x = torch.empty_like(x) if need_x else None
        grad_head = torch.zeros_like(head) if need_head else None
        for start in range(0, x.shape[0], LOSS_CHUNK_ROWS):
            rows = slice(start, start + LOSS_CHUNK_ROWS)
            logits = (x[rows] @ head.T).float()  # [rows, V]
            target, weight = targets[rows, None], weights[rows, None]
            log_norm = logits.logsumexp(dim=-1, keepdim=True)
            total += ((log_norm - logits.gather(1, target)) * weight).sum(dtype=torch.float64)
            if grad_x is not None or grad_head is not None:
                grad = logits.sub_(log_norm).exp_()
                grad.scatter_add_(1, target, torch.full_like(weight, -1.0)).mul_(weight)
                grad = grad.to(x.dtype)
                if grad_x is not None:
                    torch.mm(grad, head, out=grad_x[rows])
                if grad_head is not None:
                    grad_head.addmm_(grad.T, x[rows])
        if grad_x is not None and len(kept) < len(all_rows):
            grad_x = torch.zeros_like(all_rows).index_copy_(0, kept, grad_x)
        ctx.save_for_backward(grad_x, grad_head)
        return total.float()

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        grad_x, grad_head = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * upstream,
            None if grad_head is None else grad_head * upstream,
            None,
            None,
        )


def linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of cross-entropies in nats, logits never held whole.

    x [N, D], head [V, D], targets [N] token ids, weights [N] (0 = not trained on).
    """
    return _LinearCrossEntropy.apply(x, head, targets, weights)  # type: ignore[return-value]


def naive_linear_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The readable twin of `linear_cross_entropy`; tests hold the two equal."""
    losses = F.cross_entropy((x @ head.T).float(), targets, reduction="none")
    return (losses * weights).sum()
