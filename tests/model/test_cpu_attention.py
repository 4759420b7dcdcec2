"""The rounded attention of CPUs against the readable one: values, gradients, windows, groups."""

import math

import pytest
import torch

from fledge.model import cpu_attention
from fledge.model.attention import naive_attend, window_mask
from fledge.model.cpu_attention import rounded_attend
from tests.model.test_transformer import random_model


def inputs(tokens: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(2, tokens, heads, 16, generator=generator).transpose(1, 2).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("tokens", [2, 63, 256, 300, 530])
@pytest.mark.parametrize("window", [None, 40, 260])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_the_naive_attention_but_for_rounding(tokens, window, kv_heads):
    q, k, v = inputs(tokens, kv_heads)
    mask = window_mask(tokens, window or tokens, q.device)
    slope = torch.randn(2, 4, tokens, 16, generator=torch.Generator().manual_seed(1))
    expected = naive_attend(q, k, v, mask)
    right = torch.autograd.grad(expected, (q, k, v), slope)
    found = rounded_attend(q, k, v, 1 / math.sqrt(16), window)
    ours = torch.autograd.grad(found, (q, k, v), slope)
    assert found.dtype == torch.float32
    for a, b in zip((found, *ours), (expected, *right), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() < 0.015 * b.norm()
        # no single place is wrong: the largest difference is a rounding, too
        assert (a - b).abs().max() < 0.1 * b.abs().max()


def test_nothing_of_the_future_or_behind_the_window_comes_through():
    q, k, v = (x.detach() for x in inputs(300, 4))
    before = rounded_attend(q, k, v, 0.25, 40)
    k[:, :, 200:], v[:, :, 200:] = 9.0, 9.0
    k[:, :, :50], v[:, :, :50] = 9.0, 9.0
    after = rounded_attend(q, k, v, 0.25, 40)
    assert torch.equal(before[:, :, 100:200], after[:, :, 100:200])
    assert not torch.equal(before, after)


def test_only_training_in_rounded_products_goes_this_way(monkeypatch):
    rows = []
    real = cpu_attention.rounded_attend
    for module in ("attention", "extras"):
        monkeypatch.setattr(
            f"fledge.model.{module}.rounded_attend", lambda *a: rows.append(1) or real(*a)
        )
    ids = torch.randint(0, 96, (2, 16))
    model = random_model()
    model.loss_sum(ids, ids, torch.ones(2, 16)).backward()
    assert not rows
    model.compute_in("bfloat16_products")
    with torch.no_grad():
        model(ids)
    assert not rows
    model.loss_sum(ids, ids, torch.ones(2, 16)).backward()
    assert len(rows) == model.config.num_hidden_layers
