"""The chunked loss equals its readable twin, and the in-place pass equals autograd."""

import copy
import dataclasses

import pytest
import torch

from fledge.model import loss
from tests.model.test_extras import ALL, speedrun
from tests.model.test_transformer import random_model


def case(rows: int = 23, vocab: int = 50, *, masked: int = 0, spread: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 16, generator=generator, requires_grad=True)
    head = (spread * torch.randn(vocab, 16, generator=generator)).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) - 0.3  # negative weights: RL's advantages
    weights[torch.randperm(rows, generator=generator)[:masked]] = 0.0
    return x, head, targets, weights


@pytest.mark.parametrize("masked", [0, 9, 23])
@pytest.mark.parametrize("cap", [None, 3.0, 15.0])
def test_linear_cross_entropy_equals_its_naive_twin(monkeypatch, masked, cap):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)  # chunks of 16 rows: two, the last one short
    x, head, targets, weights = case(masked=masked)
    fast = loss.linear_cross_entropy(x, head, targets, weights, cap=cap) * 1.7
    fast_grads = torch.autograd.grad(fast, (x, head))
    naive = loss.naive_linear_cross_entropy(x, head, targets, weights, cap=cap) * 1.7
    naive_grads = torch.autograd.grad(naive, (x, head))
    torch.testing.assert_close(fast, naive, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fast_grads, naive_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 60.0])
def test_a_probability_that_vanishes_has_a_finite_loss(cap):
    """Logits spread over hundreds: p[target] is 0 in fp32, its logarithm is not."""
    x, head, targets, weights = case(spread=40.0)
    fast = loss.linear_cross_entropy(x, head, targets, weights.abs(), cap=cap)
    naive = loss.naive_linear_cross_entropy(x, head, targets, weights.abs(), cap=cap)
    assert naive > 300
    torch.testing.assert_close(fast, naive, rtol=1e-5, atol=0)


def test_it_is_exact_in_double_precision():
    x, head, targets, weights = (
        t.detach().double() if t.is_floating_point() else t for t in case()
    )
    fast = loss.linear_cross_entropy(x, head, targets, weights, cap=15.0)
    naive = loss.naive_linear_cross_entropy(x, head, targets, weights, cap=15.0)
    torch.testing.assert_close(fast, naive, rtol=1e-12, atol=0)


def test_bfloat16_rows_keep_a_float32_softmax():
    x, head, targets, weights = (
        t.detach().bfloat16() if t.is_floating_point() and t.ndim == 2 else t for t in case()
    )
    weights = weights.detach()
    fast = loss.linear_cross_entropy(x, head, targets, weights)
    naive = loss.naive_linear_cross_entropy(x, head, targets, weights)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, naive, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "tied", "speedrun"])
def test_the_training_pass_adds_the_gradients_of_autograd(kind):
    if kind == "speedrun":
        model = speedrun(**ALL)
    else:
        plain = random_model().config
        model = random_model(dataclasses.replace(plain, tie_word_embeddings=kind == "tied"))
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):  # the second pass adds to the first
        ids = torch.randint(0, 96, (3, 13), generator=generator)
        weights = (torch.rand(3, 12, generator=generator) < 0.6).float() / 7
        total = model.add_gradients(ids[:, :-1], ids[:, 1:], weights)
        expected = twin.loss_sum(ids[:, :-1], ids[:, 1:], weights)
        expected.backward()
        assert total == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("trained", [0, 1, 127, 128, 300, 512])
def test_rows_that_are_computed_come_in_few_sizes(trained):
    weights = torch.zeros(512)
    weights[torch.randperm(512, generator=torch.Generator().manual_seed(0))[:trained]] = 0.5
    kept = loss.kept_rows(weights)
    assert len(kept) % loss.KEPT_STEP == 0 and len(kept) < trained + loss.KEPT_STEP
    assert set(weights.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_few_rows_are_computed_all():
    assert loss.kept_rows(torch.tensor([0.0, 1.0, 0.0])).tolist() == [0, 1, 2]
