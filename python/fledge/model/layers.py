"""The position-wise parts of a block: RMSNorm, rotary positions, SwiGLU.

Used by `model.transformer`, `model.attention` and `model.extras`. Shapes: B batch, T tokens,
D hidden, H heads, K head_dim. Nothing here keeps state between calls.

Weights stay as they are (float32); what a layer computes in is what its input is in, which the
embeddings decide (`Embedding.compute`, set by `model.precision`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fledge.model.fp8 import fp8_linear, takes_fp8
from fledge.products import linear, rounded_linear

HALF = (torch.bfloat16, torch.float16)


def widened(x: Tensor) -> Tensor:
    """At least float32: where sums of many numbers, or small probabilities, must not be rounded."""
    return x.float() if x.dtype in HALF else x


def trains_on_cpu(x: Tensor) -> bool:
    """Whether a hand-written backward pass pays: on a GPU torch has fused kernels of its own.

    In half precision torch's kernels are taken too: they sum in float32 inside.
    """
    return x.device.type == "cpu" and torch.is_grad_enabled() and x.dtype not in HALF


class _NormPass(torch.autograd.Function):
    """RMS norm with a hand-written backward pass; `F.rms_norm` is its readable twin.

    On a CPU torch makes the norm of six operations, each with a backward pass of its own. With
    r = 1 / sqrt(mean x^2 + eps) and g = dy w: dx = r g - x r^3 mean(g x), dw = sum dy x r.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:  # type: ignore[override]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (length.square() / x.shape[-1] + eps).rsqrt_()  # [..., 1]
        inverse += length - length  # inf - inf: a length that overflowed is NaN, not a quiet 0
        ctx.save_for_backward(x, weight, inverse)
        y = x * inverse
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        product = upstream * x
        grad_weight = None
        if weight is not None:
            grad_weight = torch.mv(product.flatten(0, -2).T, inverse.flatten())
            product.mul_(weight)
            upstream = upstream * weight
        along = product.sum(dim=-1, keepdim=True) / x.shape[-1] * inverse**3
        return (upstream * inverse).addcmul_(x, along, value=-1.0), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension, times the weight if there is one.

    The mean is taken in float32 whatever x is in.
    """
    if trains_on_cpu(x):
        return _NormPass.apply(x, weight, eps)  # type: ignore[return-value]
    weight = None if weight is None else weight.to(x.dtype)  # else torch's fused kernel refuses
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt gain (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """torch's linear layer without bias, trained through the faster library of this machine.

    The weight is rounded to what the input is in, anew in every pass: a copy that is kept would
    have to follow every step of the optimizer. With `fp8` the product, and those of its gradients,
    are made of 8-bit numbers while gradients are wanted; with `rounded` of bfloat16 ones.
    """

    fp8 = rounded = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `Transformer.initialize` or a file fills the weight."""

    def rounds(self) -> bool:
        """Whether what is multiplied now is rounded to bfloat16."""
        return self.rounded and torch.is_grad_enabled()

    def forward(self, input: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled() and takes_fp8(input):
            return fp8_linear(input, self.weight)
        if self.rounds():
            return rounded_linear(input, self.weight)
        return linear(input, self.weight.to(input.dtype))


def run_block(block: nn.Module, *inputs: Any, again: bool) -> Tensor:
    """block(*inputs). With `again` and while gradients are wanted, only the inputs are kept, and
    the block is computed again when its gradients are made (Chen et al., arXiv 1604.06174): the
    same numbers, since nothing in a block is random."""
    if again and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore
    return block(*inputs)


def filled_on_host(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, to be filled by whoever asks; under `torch.no_grad`.

    On a GPU the caller fills memory of the host, one parameter at a time, so that the numbers are
    the same on every device and the host never holds all of them.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type in ("cpu", "meta"):
            yield name, parameter
            continue
        host = torch.empty(parameter.shape, dtype=parameter.dtype)
        yield name, host
        parameter.copy_(host)


class Head(nn.Linear):
    """The output head: logits [.., V] in at least float32."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `Transformer.initialize` or a file fills the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return widened(F.linear(input, self.weight.to(input.dtype)))


class SwiGLU(nn.Module):
    """Feed-forward layer down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj.rounds():
            weights = (layer.weight for layer in (self.gate_proj, self.up_proj, self.down_proj))
            return _RoundedSwiGLU.apply(x, *weights)  # type: ignore[return-value]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _RoundedSwiGLU(torch.autograd.Function):
    """SwiGLU that is rounded to bfloat16 on the way in and widened on the way out.

    What lies between is in bfloat16 as well, which halves the passes over the widest tensors of a
    block; gate and up are one product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        rows, small = x.flatten(0, -2).bfloat16(), down.bfloat16()
        both = torch.cat((gate, up)).bfloat16()
        inner = rows @ both.T  # [N, 2 I]
        g, u = inner.chunk(2, dim=-1)
        gated = F.silu(g).mul_(u)
        ctx.save_for_backward(rows, both, small, inner, gated)
        return (gated @ small.T).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        rows, both, small, inner, gated = ctx.saved_tensors
        slope = upstream.flatten(0, -2).bfloat16()
        by_gated = slope @ small
        by_inner = torch.empty_like(inner)
        (g, u), (by_g, by_u) = inner.chunk(2, dim=-1), by_inner.chunk(2, dim=-1)
        torch.mul(by_gated, F.silu(g), out=by_u)
        by_g.copy_(torch.ops.aten.silu_backward(by_gated.mul_(u), g))
        grad_x = (by_inner @ both).to(upstream.dtype).view(upstream.shape)
        grad_gate, grad_up = (by_inner.T @ rows).to(upstream.dtype).chunk(2)
        return grad_x, grad_gate, grad_up, (slope.T @ gated).to(upstream.dtype)


def rotary_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and frequency, [positions, K/2] (Su et al., arXiv 2104.09864).

    Computed in float64 so that long contexts keep their phase, stored in float32.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


class _RotatePass(torch.autograd.Function):
    """`naive_rotate` in four passes over memory; backward is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(upstream, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    y = torch.empty_like(x)  # keeps the order of x in memory, [B, T, H, K]
    half = x.shape[-1] // 2
    (a, b), (first, second) = (x[..., :half], x[..., half:]), (y[..., :half], y[..., half:])
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of the last dimension of x [B, H, T, K] by the angles [.., T, K/2].

    Pairs dimension i with i + K/2, as Hugging Face's Qwen3 and Llama do.
    """
    if trains_on_cpu(x):
        return _RotatePass.apply(x, cos, sin)  # type: ignore[return-value]
    return naive_rotate(x, cos, sin).to(x.dtype)  # angles and arithmetic in float32


def naive_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The readable form of `rotate`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _AddRows(torch.autograd.Function):
    """An embedding whose gradient goes straight into `weight.grad`: only rows that were looked up.

    torch makes a zeroed table, fills those rows and adds the whole table to the gradient: 17 ms for
    32,768 x 256, against 0.2 ms for the rows of 2,048 tokens (one Zen 5 core, docs/log.md).
    """

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        ctx.weight.grad.index_add_(0, ids.flatten(), upstream.flatten(0, -2))
        return None, None


class Embedding(nn.Embedding):
    """A table of vectors. Where `weight.grad` exists, a backward pass adds to its rows in place.

    What comes out is in `compute`, None = what the weights are in: so a network computes in it.
    """

    compute: torch.dtype | None = None

    def reset_parameters(self) -> None:
        """Nothing: `Transformer.initialize` or a file fills the weight."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        if torch.is_grad_enabled() and self.weight.grad is not None:
            rows: Tensor = _AddRows.apply(self.weight, ids)  # type: ignore[assignment]
        else:
            rows = F.embedding(ids, self.weight)
        return rows if self.compute is None else rows.to(self.compute)
