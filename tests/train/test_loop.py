"""The loop: normalisation, skipping, resuming, stopping."""

import numpy as np
import pytest
import torch
from tests.model.test_transformer import CONFIG, random_model

from fledge.data.loader import Loader
from fledge.errors import Interrupted, UserError
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.train.loop import Job, accumulate, train

RATES = LearningRates(0.01, 0.05, 0.01, 0.01, 0.0)
SCHEDULE = Schedule(steps=6, warmup_steps=1, cooldown_fraction=0.5, final_lr_fraction=0.1)


class Counting:
    """Documents of a counting language."""

    def piece(self, index: int):
        ids = (np.arange(5 + index % 9, dtype=np.int32) + index) % 90 + 2
        return ids, np.ones(len(ids), dtype=np.uint8)


class Hooks:
    def __init__(self, stop_at: int | None = None) -> None:
        self.rows: list[dict] = []
        self.saved: list[int] = []
        self.stop_at = stop_at

    def evaluate(self, step):
        return {"bpb": 1.0}

    def log(self, row):
        self.rows.append(row)

    def save(self, step):
        self.saved.append(step)

    def stop_requested(self):
        return self.stop_at is not None and len(self.rows) >= self.stop_at

    def diverged(self, step):
        return UserError(f"diverged at {step}", "why", "fix")


def run(model, optimizers, loader, hooks, start=0):
    job = Job(model, optimizers, SCHEDULE, hooks, eval_every=3, save_every=4, start=start)
    train(job, loader, rows_per_step=4, device_batch_size=3)


def fresh():
    model = Transformer(CONFIG, seed=0)
    loader = Loader(Counting(), row_tokens=16, pad_id=0, split=True)
    return model, Optimizers(model, RATES), loader


@pytest.mark.parametrize("split", [1, 2, 3, 8])
def test_gradients_do_not_depend_on_the_micro_batch(split):
    ids = torch.randint(0, 96, (5, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(5, 13, generator=torch.Generator().manual_seed(1)) < 0.6).to(torch.uint8)
    whole, parts = random_model(), random_model()
    loss, tokens = accumulate(whole, ids, mask, 5)
    other, same_tokens = accumulate(parts, ids, mask, split)
    assert other == pytest.approx(loss, rel=1e-6) and tokens == same_tokens
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_trained_tokens_gives_no_gradient():
    model = random_model()
    loss, tokens = accumulate(model, torch.ones(2, 9, dtype=torch.long), torch.zeros(2, 9), 2)
    assert (loss, tokens) == (0.0, 0)
    assert all(p.grad is None for p in model.parameters())


def test_measures_saves_and_learns():
    model, optimizers, loader = fresh()
    hooks = Hooks()
    run(model, optimizers, loader, hooks)
    assert hooks.saved == [4, 6]
    assert [row["step"] for row in hooks.rows if "bpb" in row] == [3, 6]
    assert hooks.rows[-1]["loss"] < hooks.rows[0]["loss"]


def test_stopping_saves_and_resuming_equals_never_having_stopped():
    whole, optimizers, loader = fresh()
    run(whole, optimizers, loader, Hooks())

    model, optimizers, loader = fresh()
    hooks = Hooks(stop_at=3)
    with pytest.raises(Interrupted):
        run(model, optimizers, loader, hooks)
    assert hooks.saved == [3]
    again, new_optimizers, new_loader = fresh()
    again.load_state_dict(model.state_dict())
    new_optimizers.load_state_tensors(optimizers.state_tensors())
    new_loader.restore(loader.state())
    run(again, new_optimizers, new_loader, Hooks(), start=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_loss_that_stays_non_finite_ends_training_and_saves_nothing_unsound():
    model, optimizers, _ = fresh()
    hooks = Hooks()

    class Poisoned(Loader):
        """The first five batches are sound; then the weights are not."""

        def batch(self, rows):
            if len(hooks.rows) == 5:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))
            return super().batch(rows)

    poisoned = Poisoned(Counting(), row_tokens=16, pad_id=0, split=True)
    job = Job(model, optimizers, Schedule(40, 0, 0.0, 0.1), hooks, eval_every=100, save_every=2)
    with pytest.raises(UserError, match="diverged at 15"):
        train(job, poisoned, rows_per_step=2, device_batch_size=2)
    assert hooks.saved == [2, 4]
    assert [row.get("skipped", 0) for row in hooks.rows] == [0] * 5 + [1] * 10


def test_a_single_non_finite_loss_is_skipped():
    model, optimizers, loader = fresh()
    hooks = Hooks()
    healthy = model.add_gradients
    factors = iter([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    model.add_gradients = lambda i, t, w: healthy(i, t, w * next(factors))  # type: ignore
    job = Job(model, optimizers, SCHEDULE, hooks, eval_every=3, save_every=2)
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert [row.get("skipped", 0) for row in hooks.rows] == [0, 1, 0, 0, 0, 0]
    assert hooks.saved == [4, 6]
    assert all(torch.isfinite(p).all() for p in model.parameters())
