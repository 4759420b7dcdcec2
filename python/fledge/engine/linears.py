"""Matrix products of packed weights: float32, bfloat16 and int8.

`pack` gives a `Linear`, which knows x W^T and the residual that a block adds behind it;
`pack_swiglu` the whole feed-forward layer. Used by `engine.packed`. float32 goes through
oneDNN where torch has it: torch's own float32 product goes through MKL, which leaves AMD's AVX-512
unused (docs/log.md has the figures), and oneDNN takes the step behind the product in as well.
Which form is how fast is measured in benchmarks/infer_cpu.md.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.errors import UserError
from fledge.products import has_onednn

HUGE_PAGE = 2**21  # bytes
FUSE_FROM = 2**19  # numbers in one of the two matrices
FORMATS = ("float32", "bfloat16", "int8")


class Linear(Protocol):
    """Products with W [out, in] of x [N, in], in and out float32."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """x W^T + other."""
        ...


def pack(weight: Tensor, weights: str) -> Linear:
    """The product with `weight` [out, in], stored in one of FORMATS."""
    weight = weight.detach()
    if weights == "float32":
        return OneDnnLinear(weight) if has_onednn() else PlainLinear(weight)
    if weights == "bfloat16":
        return BFloat16Linear(weight)
    if weights == "int8" and has_onednn():
        return Int8Linear(weight)
    raise UserError(
        f"there are no {weights!r} weights here",
        f"known: {', '.join(FORMATS)}; int8 needs a torch with oneDNN",
        "choose another format",
    )


def pack_swiglu(gate: Tensor, up: Tensor, down: Tensor, weights: str) -> SwiGLU:
    """The feed-forward layer of two matrices [inner, D] and one [D, inner]."""
    # a small product costs its call: one for both halves is cheaper than a fused one for each
    if weights == "float32" and has_onednn() and gate.numel() >= FUSE_FROM:
        gated = OneDnnGated(gate.detach(), up.detach())
        return SwiGLU(gated, pack(F.pad(down.detach(), (0, _padding(len(gate)))), weights))
    return SwiGLU(PlainGated(pack(torch.cat((gate, up)), weights)), pack(down, weights))


class SwiGLU:
    """The feed-forward layer with the residual: down(silu(gate x) * (up x)) + other."""

    def __init__(self, gated: PlainGated | OneDnnGated, down: Linear) -> None:
        self._gated = gated
        self._down = down

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self._down.plus(self._gated(x), other)


class PlainLinear:
    """The readable twin of the others."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class PlainGated:
    """One product for both halves."""

    def __init__(self, both: Linear) -> None:
        self._both = both

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._both(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def _turned(weight: Tensor, padding: int) -> Tensor:
    """The weights in the order that oneDNN reads fastest, `padding` zero outputs added."""
    out, width = weight.shape
    memory = _zeros(width, out + padding)
    memory[:, :out] = weight.t()
    return memory.t()


def _zeros(rows: int, columns: int) -> Tensor:
    """Float32 zeros, in huge pages where the system gives them: a product of 16 rows then spends
    a fifth less time (docs/log.md); pages of 4 KiB run out of the processor's table of them."""
    size = rows * columns * 4
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < HUGE_PAGE:
        return torch.zeros(rows, columns)
    memory = mmap.mmap(-1, -(-size // HUGE_PAGE) * HUGE_PAGE)  # zero, and freed with the tensor
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=rows * columns).view(rows, columns)


def _padding(outputs: int) -> int:
    """Zero outputs to add where rows of memory would lie a multiple of 4 KiB apart.

    Such rows fight for the same lines of the cache, and the product takes two to three times as
    long (docs/log.md).
    """
    return 32 if outputs * 4 % 4096 == 0 else 0


class OneDnnLinear:
    """oneDNN's product, the addition fused in; weights [in, out] in memory."""

    def __init__(self, weight: Tensor) -> None:
        self._outputs = len(weight)
        self._padding = _padding(self._outputs)
        self._weight = _turned(weight, self._padding)
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._run_with = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        y = self._run(x, self._weight, None, "none", [], "")
        return y[:, : self._outputs] if self._padding else y

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        if self._padding:
            return self(x) + other
        return self._run_with(x, other, self._weight, None, "add")


class OneDnnGated:
    """Two products, SiLU fused into the first and the multiplication into the second."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self._outputs = len(gate)
        padding = _padding(self._outputs)
        self._gate, self._up = _turned(gate, padding), _turned(up, padding)
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._run_with = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        """[N, out] and `padding` zeros behind it."""
        gate = self._run(x, self._gate, None, "swish", [], "")
        return self._run_with(x, gate, self._up, None, "mul")


class BFloat16Linear(PlainLinear):
    """Half the bytes; sums are in float32, the product is rounded to bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.bfloat16())

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self._weight).float()


class Int8Linear(PlainLinear):
    """A quarter of the bytes: symmetric int8 weights, one scale per output; inputs in 8 bits too.

    Several rows: each is divided by its own largest magnitude before it is rounded, so that a
    row's result does not depend on the others (oneDNN wants unsigned inputs: 128 stands for 0).
    One row: FBGEMM does all of it in one call, in less than half the time of a small product.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        weight = weight.float()
        self._scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        rounded = (weight / self._scale[:, None]).round().clamp_(-127, 127).to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zero = torch.zeros(len(weight), dtype=torch.int32)
        self._run = torch.ops.onednn.qlinear_pointwise.default
        self._one_row = _pack_for_one_row(weight, self._scale)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) == 1 and self._one_row is not None:
            return torch.ops.quantized.linear_dynamic(x, self._one_row)
        largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True)
        largest = largest.clamp_min_(1e-12)
        rounded = (x * (127.0 / largest)).add_(128.5).to(torch.uint8)
        product = self._run(
            rounded,
            1 / 127,
            128,
            self._weight,
            self._scale,
            self._zero,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product.mul_(largest)


def _pack_for_one_row(weight: Tensor, scale: Tensor) -> object | None:
    """FBGEMM's form of the same int8 weights; None where torch has no FBGEMM or no VNNI.

    Without VNNI its sums of two products saturate at 16 bits.
    """
    backend = torch.backends.quantized
    if "fbgemm" not in backend.supported_engines or not torch.cpu._is_vnni_supported():
        return None
    before = backend.engine
    try:
        backend.engine = "fbgemm"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are to go; the kernel stays
            zero = torch.zeros(len(weight), dtype=torch.long)
            tensor = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(tensor, None)
    finally:
        backend.engine = before
