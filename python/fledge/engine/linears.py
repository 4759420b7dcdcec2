"""Matrix products of packed weights: float32, bfloat16 and int8.

`pack` gives a function of x [N, in] that returns x W^T [N, out], in float32, added to `add_to` if
that is given. Used by `engine.packed`. Which form is fastest for how many rows was measured:
benchmarks/infer_cpu.md. The weights of the float32 form stay those of the caller where they can.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.errors import UserError

FORMATS = ("float32", "bfloat16", "int8")


class Linear(Protocol):
    """x [N, in] -> x W^T (+ add_to) [N, out]."""

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor: ...


def pack(weight: Tensor, weights: str) -> Linear:
    """The product with `weight` [out, in], stored in one of FORMATS."""
    weight = weight.detach()
    if weights == "float32":
        return Float32Linear(weight)
    if weights == "bfloat16":
        return BFloat16Linear(weight)
    if weights == "int8":
        return Int8Linear(weight)
    raise UserError(
        f"there are no {weights!r} weights", f"known: {', '.join(FORMATS)}", "choose one of them"
    )


class Float32Linear:
    """The plain product."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._turned = weight.t()

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        if add_to is None:
            return F.linear(x, self._weight)
        return torch.addmm(add_to, x, self._turned)


class BFloat16Linear:
    """Half the bytes; the sum is in float32, the result is rounded to bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.bfloat16()

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = F.linear(x.bfloat16(), self._weight).float()
        return y if add_to is None else y.add_(add_to)


class Int8Linear:
    """A quarter of the bytes: symmetric int8 weights with one scale per output."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.float()
        self._scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        self._weight = (weight / self._scale[:, None]).round().clamp(-127, 127).to(torch.int8)

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x, self._weight, self._scale)
        return y if add_to is None else y.add_(add_to)
