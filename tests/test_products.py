"""Products of training: whichever library makes them, they are those of torch."""

from __future__ import annotations

import pytest
import torch

from fledge import products


@pytest.fixture(params=[False, True], ids=["torch", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return request.param


def matrices(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_products(library: bool) -> None:
    a, b = matrices((17, 24), (40, 24))
    torch.testing.assert_close(products.multiply(a, b), a @ b.T)
    turned = b.T.contiguous().T  # another order of memory
    torch.testing.assert_close(products.multiply(a, turned), a @ b.T)
    kept = torch.empty(17, 40)
    assert (products.multiply(a, b, out=lambda: kept) is kept) is not library
    stack, other = matrices((2, 3, 5, 8), (2, 3, 7, 8))
    torch.testing.assert_close(products.multiply_each(stack, other), stack @ other.mT)


def test_the_layer_and_its_gradients(library: bool) -> None:
    x, weight, upstream = matrices((2, 9, 24), (40, 24), (2, 9, 40))
    found = []
    for call in (products.linear, torch.nn.functional.linear):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        call(*inputs).backward(upstream)
        found.append([call(*inputs).detach(), *(i.grad for i in inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_double_precision_is_torchs(library: bool) -> None:
    a, b = (m.double() for m in matrices((4, 6), (5, 6)))
    assert torch.equal(products.multiply(a, b), a @ b.T)
    with torch.no_grad():
        assert torch.equal(products.linear(a, b), torch.nn.functional.linear(a, b))
