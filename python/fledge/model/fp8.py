"""A linear layer's three products in 8-bit numbers; one scale per tensor, made anew each time.

x W^T multiplies e4m3 numbers (4 bits of exponent, 3 of mantissa); gradients, whose sizes spread
more, are e5m2 (Micikevicius et al. 2022, arXiv 2209.05433). Each tensor is first multiplied so that
its largest magnitude is the largest number of the format. `_scaled_mm` sums in float32 and gives
back what the input was in. Called by `model.layers.Linear` where `model.precision` says so, while
gradients are wanted; evaluation never comes here. Runs on GPUs from the H100 and RTX 40 on, and,
for tests, on CPUs. Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # every side of a product: what the kernels ask for
LEAST_SIDE = 128
"""Of a weight: below this the roundings cost more than the product saves (nanochat, fp8.py)."""


def worth_fp8(inputs: int, outputs: int) -> bool:
    """Whether a weight [O, I] is of a size that 8 bits can speed up."""
    sides = (inputs, outputs)
    return min(sides) >= LEAST_SIDE and all(side % MULTIPLE == 0 for side in sides)


def takes_fp8(x: Tensor) -> bool:
    """Whether the rows of x [.., I] make whole tiles; they are summed over in the weight's
    gradient."""
    return (x.numel() // x.shape[-1]) % MULTIPLE == 0


def rounded(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, the float32 number to multiply it by to have x again)."""
    most = torch.finfo(kind).max
    # float64 on the way: most / a tiny largest magnitude overflows float32
    largest = x.abs().amax().double().clamp_min(1e-300)
    up = (most / largest).clamp(max=torch.finfo(torch.float32).max).float()
    # the clamp is for the last bit of the product; not a number stays not a number
    return (x.float() * up).clamp(-most, most).to(kind), up.reciprocal()


def _product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a b^T of 8-bit matrices [M, K] and [N, K], both contiguous."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a, b.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype
    )


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, x [.., I] in half precision and W [O, I] as it is kept, differentiable."""
    return _Fp8Linear.apply(x, weight)  # type: ignore[return-value]


class _Fp8Linear(torch.autograd.Function):
    """Keeps the 8-bit copies for the backward pass: half the memory of 16-bit ones."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        rows, scale_x = rounded(x.flatten(0, -2), INPUT)
        small, scale_w = rounded(weight, INPUT)
        ctx.save_for_backward(rows, scale_x, small, scale_w)
        ctx.dtype = weight.dtype
        return _product(rows, small, (scale_x, scale_w), x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        rows, scale_x, small, scale_w = ctx.saved_tensors
        slope, scale = rounded(upstream.flatten(0, -2), GRADIENT)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(slope, small.t().contiguous(), (scale, scale_w), upstream.dtype)
            grad_x = grad_x.view(*upstream.shape[:-1], small.shape[1])
        if ctx.needs_input_grad[1]:
            turned = slope.t().contiguous(), rows.t().contiguous()
            grad_weight = _product(*turned, (scale, scale_x), upstream.dtype).to(ctx.dtype)
        return grad_x, grad_weight
