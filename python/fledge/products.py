"""Matrix products of training on a CPU: float32 through oneDNN where MKL is slow, or rounded.

torch multiplies float32 matrices on x86 through MKL, which leaves the AVX-512 of AMD's processors
unused; oneDNN, which torch brings as well, does not (docs/log.md: 1.5 to 2.3 times as fast on a
Zen 5). The choice depends on the processor alone, so that two processes on one machine make the
same bits. `rounded_linear` multiplies bfloat16 copies of float32 matrices, sums in float32 and
rounds the sums: again faster where the processor has instructions for it (docs/decisions/044). Used
by `model` (the linear layers and the loss) and by Muon; knows neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def has_onednn() -> bool:
    """Whether this torch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512 and a torch with oneDNN's linear layer."""
    if (
        torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return has_onednn() and "AuthenticAMD" in vendor


def _fits(a: Tensor) -> bool:
    return a.device.type == "cpu" and a.dtype == torch.float32 and prefers_onednn()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of float32 matrices [M, K] and [N, K] in any order of memory, through oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def multiply(a: Tensor, b: Tensor, *, out: Callable[[], Tensor] | None = None) -> Tensor:
    """a b^T of matrices [M, K] and [N, K]; `out` gives memory for it, and is asked if it helps."""
    if _fits(a):
        return product(a, b)
    return torch.mm(a, b.T, out=None if out is None else out())


def multiply_each(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of stacks of matrices [..., M, K] and [..., N, K]."""
    if not _fits(a):
        return a @ b.mT
    if a.dim() == 2:
        return product(a, b)
    flat = [product(x, y) for x, y in zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)]
    return torch.stack(flat).view(*a.shape[:-1], b.shape[-2])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, x [..., in] and W [out, in], differentiable.

    Without gradients it is torch's own product: exams, chats and exports share one path.
    """
    if torch.is_grad_enabled() and _fits(x):
        return _Product.apply(x, weight)  # type: ignore[return-value]
    return torch.nn.functional.linear(x, weight)


class _Product(torch.autograd.Function):
    """x W^T and its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = upstream.flatten(0, -2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(rows, weight.T).view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = product(rows.T, x.flatten(0, -2).T)
        return grad_x, grad_weight


def rounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of float32 x [..., in] and W [out, in], both rounded to bfloat16; float32 comes out.

    The gradients' products are rounded likewise. Differentiable.
    """
    return _RoundedProduct.apply(x, weight)  # type: ignore[return-value]


class _RoundedProduct(torch.autograd.Function):
    """Keeps the bfloat16 copies for the backward pass: half the memory of what was rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        rows, small = x.flatten(0, -2).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, small)
        return (rows @ small.T).to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        rows, small = ctx.saved_tensors
        slopes = upstream.flatten(0, -2).bfloat16()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (slopes @ small).to(upstream.dtype)
            grad_x = grad_x.view(*upstream.shape[:-1], small.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weight = (slopes.T @ rows).to(upstream.dtype)
        return grad_x, grad_weight
