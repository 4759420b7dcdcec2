"""Fast kernels equal their readable twins."""

import pytest
import torch

from fledge.model import attention, layers


@pytest.mark.parametrize("masked_rows", [0, 9, 23])
def test_linear_cross_entropy_equals_its_naive_twin(monkeypatch, masked_rows):
    monkeypatch.setattr(layers, "LOSS_CHUNK_ROWS", 7)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 16, generator=generator, requires_grad=True)
    head = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (23,), generator=generator)
    weights = torch.rand(23, generator=generator) - 0.3  # negative weights: RL's advantages
    weights[torch.randperm(23, generator=generator)[:masked_rows]] = 0.0
    fast = layers.linear_cross_entropy(x, head, targets, weights) * 1.7
    fast_grads = torch.autograd.grad(fast, (x, head))
    naive = layers.naive_linear_cross_entropy(x, head, targets, weights) * 1.7
    naive_grads = torch.autograd.grad(naive, (x, head))
    torch.testing.assert_close(fast, naive, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fast_grads, naive_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_its_naive_twin(kv_heads, masked):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 5, 8, generator=generator)
    k, v = torch.randn(2, 3, kv_heads, 5, 8, generator=generator)
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask[1, :, :, 0] = True
        mask[1, :, 3:, 1] = False
    torch.testing.assert_close(
        attention.attend(q, k, v, mask), attention.naive_attend(q, k, v, mask)
    )


def test_rotation_keeps_length_and_depends_on_distance_only():
    cos, sin = layers.rotary_table(32, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        a = layers.rotate(q, cos[i : i + 1], sin[i : i + 1])
        b = layers.rotate(k, cos[j : j + 1], sin[j : j + 1])
        return float((a * b).sum())

    assert score(3, 1) == pytest.approx(score(20, 18), abs=1e-5)
    turned = layers.rotate(q, cos[7:8], sin[7:8])
    assert float(turned.norm()) == pytest.approx(float(q.norm()), abs=1e-5)
