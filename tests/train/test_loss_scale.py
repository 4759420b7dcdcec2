"""float16: the scale of the loss falls and rises, loses no batch, and is remembered."""

import copy
import math

import pytest
import torch

from fledge.data.loader import Loader
from fledge.model import Transformer
from fledge.optim.groups import Optimizers
from fledge.optim.schedule import Schedule
from fledge.train import loss_scale
from fledge.train.loop import Job, accumulate, train
from fledge.train.loss_scale import LossScale
from tests.model.test_transformer import CONFIG
from tests.train.test_loop import RATES, Counting, Hooks


def test_the_scale_halves_until_gradients_are_finite_and_grows_again(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    scale = LossScale(dynamic=True)
    assert scale.value == 2**16
    assert scale.overflowed(1.0, math.inf) and scale.overflowed(1.0, math.nan)
    assert not scale.overflowed(1.0, 5.0) and scale.value == 2**14
    for _ in range(3):
        scale.good_step()
    assert scale.value == 2**15
    assert scale.overflowed(1.0, math.inf)  # an overflow begins the count anew
    scale.good_step()
    scale.good_step()
    assert scale.value == 2**14
    scale.good_step()
    assert scale.value == 2**15
    other = LossScale(dynamic=True)
    other.restore(scale.state())
    assert other.state() == scale.state() == {"value": 2.0**15, "good": 0}


def test_what_is_not_the_scales_fault_is_left_to_others_and_does_not_wear_it_down():
    scale = LossScale(dynamic=True)
    assert not scale.overflowed(math.nan, math.nan)  # the loss itself
    tries = 0
    while scale.overflowed(1.0, math.inf):
        tries += 1
    assert tries == 16 and scale.value == 2**16


def test_other_dtypes_have_a_scale_of_one_and_nothing_to_save():
    scale = LossScale()
    assert not scale.overflowed(1.0, math.inf)
    scale.good_step()
    assert scale.value == 1.0 and scale.state() == {}
    scale.restore({"value": 8.0, "good": 1})
    assert scale.value == 1.0


def job_of(dtype: str, hooks: Hooks, steps: int, *, dynamic: bool = True) -> tuple[Job, Loader]:
    model = Transformer(CONFIG, seed=0).compute_in(dtype)
    loader = Loader(Counting(), row_tokens=16, pad_id=0, split=True)
    job = Job(
        model,
        Optimizers(model, RATES),
        Schedule(steps, 2, 0.5, 0.1),
        hooks,
        1000,
        1000,
        scale=LossScale(dynamic=dynamic),
    )
    return job, loader


def overflowing(model: Transformer, limit: float) -> list[float]:
    """From now on gradients of a token's share above `limit` are infinite; the shares that were."""
    healthy, seen = model.add_gradients, []

    def watched(ids, targets, weights):
        loss = healthy(ids, targets, weights)
        seen.append(weights.max().item())
        if seen[-1] > limit:
            gradient = model.get_parameter("model.norm.weight").grad
            assert gradient is not None
            gradient[0] = math.inf
        return loss

    model.add_gradients = watched  # type: ignore[method-assign]
    return seen


def test_an_overflow_costs_a_pass_and_not_the_batch():
    """In float32, where powers of two change no bit: losses and weights as without any scale."""
    plain, hooks = Hooks(), Hooks()
    job, loader = job_of("float32", plain, 6, dynamic=False)
    train(job, loader, rows_per_step=4, device_batch_size=3)
    scaled, loader = job_of("float32", hooks, 6)
    seen = overflowing(scaled.model, 2**13 / 60)  # 64 tokens a step, less padding
    train(scaled, loader, rows_per_step=4, device_batch_size=3)
    assert [row["loss"] for row in hooks.rows] == [row["loss"] for row in plain.rows]
    norms = [[row["gradient_norm"] for row in h.rows] for h in (hooks, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert not any("skipped" in row for row in hooks.rows)
    assert {row["loss_scale"] for row in hooks.rows} == {2**13}
    assert len(hooks.notes) == 3 and "loss scale of 8,192" in hooks.notes[-1]
    assert len(seen) == 2 * (6 + 3)  # two micro-steps a pass, three passes made again
    for name, value in job.model.state_dict().items():
        assert torch.equal(value, scaled.model.state_dict()[name]), name


def test_a_gradient_that_no_scale_mends_is_skipped_once():
    hooks = Hooks()
    job, loader = job_of("float32", hooks, 5)
    healthy, step = job.model.add_gradients, []

    def spoilt(ids, targets, weights):
        loss = healthy(ids, targets, weights)
        if len(hooks.rows) == 2:
            step.append(1)
            gradient = job.model.get_parameter("model.norm.weight").grad
            assert gradient is not None
            gradient[0] = math.nan
        return loss

    job.model.add_gradients = spoilt  # type: ignore[method-assign]
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert [row.get("skipped", 0) for row in hooks.rows] == [0, 0, 1, 0, 0]
    assert {row["loss_scale"] for row in hooks.rows} == {2**16}
    assert len(step) == 17


def test_small_gradients_need_the_scale():
    """Of a step of half a million tokens, one part: without a scale most of it is zero."""
    ids = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 17, dtype=torch.uint8)
    share = 1 / 2**15  # as if a step had 2^15 times as many tokens
    right = Transformer(CONFIG, seed=0)
    torch.nn.init.normal_(right.lm_head.weight, std=0.1)
    errors = {}
    for scale in (1.0, 2.0**16):
        model = copy.deepcopy(right).compute_in("float16")
        accumulate(model, ids, mask, 4, scale=scale * share)
        expected = copy.deepcopy(right)
        accumulate(expected, ids, mask, 4)
        ours, theirs = (m.get_parameter("model.norm.weight").grad for m in (model, expected))
        assert ours is not None and theirs is not None
        ours = ours / (scale * share)
        errors[scale] = ((ours - theirs).norm() / theirs.norm()).item()
    assert errors[1.0] > 0.05 and errors[2.0**16] < 0.01


def test_float16_learns_as_float32_does():
    losses = {}
    for dtype in ("float32", "float16", "bfloat16"):
        hooks = Hooks()
        job, loader = job_of(dtype, hooks, 40, dynamic=dtype == "float16")
        train(job, loader, rows_per_step=4, device_batch_size=3)
        losses[dtype] = [row["loss"] for row in hooks.rows]
    for dtype in ("float16", "bfloat16"):
        assert losses[dtype][0] == pytest.approx(losses["float32"][0], abs=0.01)
        assert losses[dtype][-1] == pytest.approx(losses["float32"][-1], abs=0.2)
        assert losses[dtype][-1] < 0.6 * losses[dtype][0]
        assert losses[dtype] != losses["float32"]
