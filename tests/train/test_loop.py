"""The loop: normalisation, skipping, rolling back, memory, resuming, stopping."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fledge.data.loader import Loader
from fledge.errors import Interrupted, UserError
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.train import checkpoint
from fledge.train.loop import Job, accumulate, largest_that_fits, train
from fledge.train.metrics import Speed
from tests.model.test_extras import ALL, speedrun
from tests.model.test_transformer import CONFIG, random_model

RATES = LearningRates(0.01, 0.05, 0.01, 0.01, 0.0)
SCHEDULE = Schedule(steps=6, warmup_steps=1, cooldown_fraction=0.5, final_lr_fraction=0.1)


class Counting:
    """Documents of a counting language."""

    def piece(self, index: int):
        ids = (np.arange(5 + index % 9, dtype=np.int32) + index) % 90 + 2
        return ids, np.ones(len(ids), dtype=np.uint8)


class Hooks:
    """Records what happens; with a `job` it keeps its last save and can go back to it."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rows: list[dict] = []
        self.saved: list[int] = []
        self.notes: list[str] = []
        self.stop_at = stop_at
        self.job: Job | None = None
        self.kept: tuple | None = None

    def evaluate(self, step):
        return {"bpb": 1.0}

    def log(self, row):
        self.rows.append(row)

    def save(self, step):
        self.saved.append(step)
        if self.job is not None:
            state = copy.deepcopy(self.job.model.state_dict())
            self.kept = step, state, self.job.optimizers.state_tensors()

    def restore(self):
        if self.kept is None or self.job is None:
            return None
        step, weights, state = self.kept
        self.job.model.load_state_dict(weights)
        self.job.optimizers.forget()
        self.job.optimizers.load_state_tensors(state)
        return step

    def note(self, text):
        self.notes.append(text)

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


@pytest.mark.parametrize("kind", ["qwen3", "speedrun"])
@pytest.mark.parametrize("split", [1, 3, 8])
def test_gradients_do_not_depend_on_the_micro_batch(split, kind):
    """11 rows: no split divides them but 1."""
    ids = torch.randint(0, 96, (11, 13), generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(11, 13, generator=torch.Generator().manual_seed(1)) < 0.6).to(torch.uint8)
    mask[4:6] = 0  # a pass of nothing but weight 0
    make = random_model if kind == "qwen3" else lambda: speedrun(**ALL)
    whole, parts = make(), make()
    loss, tokens = accumulate(whole, ids, mask, 11)
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


@pytest.mark.timeout(900)  # five seconds of work, but the machine may be busy
@pytest.mark.parametrize("arch", ["qwen3", "speedrun"])
def test_half_resume_half_equals_the_whole_bit_for_bit(tmp_path, arch):
    """200 steps against 100, a checkpoint on disk, 100 more in fresh objects; two micro-steps."""
    rates = LearningRates(0.02, 0.1, 0.01, 0.002, 0.1, 0.9 if arch == "speedrun" else 0.0)
    schedule = Schedule(200, 5, 0.5, 0.1, "sqrt", "cosine", "warm")
    config = speedrun(**ALL).config if arch == "speedrun" else CONFIG

    def build(folder=None):
        model = Transformer(config, seed=0) if folder is None else Transformer.load(folder)
        model.train()
        loader = Loader(Counting(), row_tokens=16, pad_id=0, split=True)
        return model, Optimizers(model, rates), loader

    def go_on(parts, hooks, start=0, watch=None):
        model, optimizers, loader = parts
        job = Job(model, optimizers, schedule, hooks, eval_every=999, save_every=100, start=start)
        job.watch.restore(watch or {})
        train(job, loader, rows_per_step=4, device_batch_size=3)
        return job

    class Saving(Hooks):
        parts: tuple
        job: Job

        def save(self, step):
            model, optimizers, loader = self.parts
            if step == 100:
                state = {"step": step, "loader": loader.state(), "watch": self.job.watch.state()}
                checkpoint.write(
                    tmp_path, model=model, optimizers=optimizers, state=state, token_ids={}
                )

    whole, saving = build(), Saving()
    saving.parts = whole
    model, optimizers, loader = whole
    saving.job = Job(model, optimizers, schedule, saving, eval_every=999, save_every=100)
    train(saving.job, loader, rows_per_step=4, device_batch_size=3)

    checkpoint.verify(tmp_path)
    state = checkpoint.read_state(tmp_path)
    half = build(tmp_path)
    assert checkpoint.read_optimizers(tmp_path, half[1])
    half[2].restore(state["loader"])
    hooks = Hooks()
    job = go_on(half, hooks, start=state["step"], watch=state["watch"])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, half[0].state_dict()[name]), name
    ours, theirs = half[1].state_tensors(), whole[1].state_tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [r["loss"] for r in hooks.rows] == [r["loss"] for r in saving.rows[100:]]
    assert job.watch.state() == saving.job.watch.state()
    assert hooks.rows[-1]["loss"] < 0.7 * saving.rows[0]["loss"]


def test_state_of_several_ranks_is_read_and_a_missing_file_is_named(tmp_path):
    """As M ranks would write it: each tensor in one of the files that index.json names."""
    model, optimizers, loader = fresh()
    run(model, optimizers, loader, Hooks())
    checkpoint.write(tmp_path, model=model, optimizers=optimizers, state={"step": 6}, token_ids={})
    folder = tmp_path / "train_state"
    whole = folder / "optimizer-00001-of-1.safetensors"
    tensors = optimizers.state_tensors()
    names = sorted(tensors)
    files = [f"optimizer-0000{i + 1}-of-3.safetensors" for i in range(3)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
    whole.unlink()
    index = {"files": files, "tensors": names}
    (folder / "index.json").write_text(json.dumps(index))
    again = Optimizers(Transformer.load(tmp_path), RATES)
    assert checkpoint.read_optimizers(tmp_path, again)
    found = again.state_tensors()
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in found)
    (folder / "index.json").write_text(json.dumps(index | {"files": files[:2]}))
    with pytest.raises(UserError, match=names[2]):
        checkpoint.read_optimizers(tmp_path, again)
    (folder / "index.json").write_text(json.dumps(index))
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match="optimizer-00002-of-3"):
        checkpoint.read_optimizers(tmp_path, again)


def test_a_request_to_stop_saves_and_says_so():
    model, optimizers, loader = fresh()
    hooks = Hooks(stop_at=3)
    with pytest.raises(Interrupted):
        run(model, optimizers, loader, hooks)
    assert hooks.saved == [3]


def test_a_loss_that_stays_non_finite_ends_training_and_saves_nothing_unsound():
    model, optimizers, _ = fresh()
    hooks = Hooks()

    class Poisoned(Loader):
        """The first five batches are sound; then the weights are not."""

        def batch(self, rows):
            if len(hooks.rows) == 5:
                with torch.no_grad():
                    model.get_parameter("model.norm.weight").fill_(float("nan"))
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


def nan_at(model: Transformer, bad: dict[int, float]):
    """From now on the n-th pass has its weights multiplied: NaN, or a spike."""
    healthy, count = model.add_gradients, iter(range(10**9))
    model.add_gradients = lambda i, t, w: healthy(i, t, w * bad.get(next(count), 1.0))  # type: ignore


def long_job(hooks, steps=60, save_every=10, **rest):
    model, optimizers, loader = fresh()
    job = Job(model, optimizers, Schedule(steps, 2, 0.5, 0.1), hooks, 1000, save_every, **rest)
    hooks.job = job
    return job, loader


def test_a_spike_is_skipped_and_said():
    hooks = Hooks()
    job, loader = long_job(hooks)
    nan_at(job.model, {40: 100.0})
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert [i for i, row in enumerate(hooks.rows) if "skipped" in row] == [40]
    assert hooks.rows[40]["loss"] > 10 and hooks.rows[41]["loss"] < 2
    assert "step 41 was skipped" in hooks.notes[0] and len(hooks.notes) == 1


def test_early_or_mild_rises_are_no_spikes():
    hooks = Hooks()
    job, loader = long_job(hooks)
    nan_at(job.model, {3: 100.0, 40: 2.0})
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert not hooks.notes and not any("skipped" in row for row in hooks.rows)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    hooks = Hooks()
    job, loader = long_job(hooks, steps=6)
    healthy, count = job.model.add_gradients, iter(range(99))

    def poisoned(ids, targets, weights):
        loss = healthy(ids, targets, weights)
        if next(count) == 2:
            gradient = job.model.get_parameter("model.norm.weight").grad
            assert gradient is not None
            gradient[0] = float("inf")
        return loss

    job.model.add_gradients = poisoned  # type: ignore[method-assign]
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert [i for i, row in enumerate(hooks.rows) if "skipped" in row] == [2]
    assert all(torch.isfinite(p).all() for p in job.model.parameters())


def test_spoilt_weights_are_rolled_back_and_training_goes_on():
    hooks = Hooks()
    job, _ = long_job(hooks)

    class Poisoned(Loader):
        def batch(self, rows):
            if len(hooks.rows) == 33:
                with torch.no_grad():
                    job.model.get_parameter("model.norm.weight").fill_(float("nan"))
            return super().batch(rows)

    loader = Poisoned(Counting(), row_tokens=16, pad_id=0, split=True)
    train(job, loader, rows_per_step=2, device_batch_size=2)
    skipped = [i for i, row in enumerate(hooks.rows) if "skipped" in row]
    assert skipped == [33, 34, 35, 36, 37]
    assert [row["rolled_back_to"] for row in hooks.rows if "rolled_back_to" in row] == [30]
    assert "back to the weights of step 30" in hooks.notes[5]
    assert hooks.saved == [10, 20, 30, 40, 50, 60] and hooks.rows[-1]["step"] == 60
    assert hooks.rows[-1]["loss"] < hooks.rows[32]["loss"]


def test_weights_that_spoil_in_the_last_step_are_not_what_is_saved():
    hooks = Hooks()
    job, _ = long_job(hooks, steps=12, save_every=5)

    class Poisoned(Loader):
        def batch(self, rows):
            if len(hooks.rows) == 11:
                with torch.no_grad():
                    job.model.get_parameter("model.norm.weight").fill_(float("nan"))
            return super().batch(rows)

    loader = Poisoned(Counting(), row_tokens=16, pad_id=0, split=True)
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert hooks.rows[-1]["rolled_back_to"] == 10 and hooks.saved == [5, 10, 12]
    assert all(torch.isfinite(p).all() for p in job.model.parameters())


def test_a_level_that_stays_high_is_learnt_from_in_the_end():
    """Ten finite losses far above the mean are data, not an accident: no give-up."""
    hooks = Hooks()
    job, loader = long_job(hooks, save_every=1000)
    nan_at(job.model, dict.fromkeys(range(40, 60), 100.0))
    train(job, loader, rows_per_step=2, device_batch_size=2)
    assert [i for i, row in enumerate(hooks.rows) if "skipped" in row] == list(range(40, 49))


def test_rolling_back_again_and_again_gives_up():
    hooks = Hooks()
    job, loader = long_job(hooks, steps=400)
    bad = {i for start in range(30, 400, 20) for i in range(start, start + 6)}
    nan_at(job.model, dict.fromkeys(bad, float("nan")))
    with pytest.raises(UserError, match="diverged"):
        train(job, loader, rows_per_step=2, device_batch_size=2)
    assert sum("rolled_back_to" in row for row in hooks.rows) == 6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_halves_the_pass_and_changes_nothing_else(error):
    """Passes of more than 2 rows fail, one of them only after it has added gradients."""
    plain, hooks = Hooks(), Hooks()
    job, loader = long_job(plain, steps=5)
    train(job, loader, rows_per_step=8, device_batch_size=2)
    small, loader = long_job(hooks, steps=5)
    healthy = small.model.add_gradients

    def cramped(ids, targets, weights):
        loss = healthy(ids, targets, weights)
        if len(ids) > 2:
            raise error
        return loss

    small.model.add_gradients = cramped  # type: ignore[method-assign]
    train(small, loader, rows_per_step=8, device_batch_size=8)
    assert [r["loss"] for r in hooks.rows] == [r["loss"] for r in plain.rows]
    assert [n.split(":")[1] for n in hooks.notes] == [
        " going on with 4 rows at a time, the same numbers",
        " going on with 2 rows at a time, the same numbers",
    ]
    for name, value in job.model.state_dict().items():
        assert torch.equal(value, small.model.state_dict()[name]), name


def test_a_row_that_does_not_fit_is_the_users_error_and_other_errors_are_not():
    for error, kind in ((MemoryError(), UserError), (RuntimeError("shapes"), RuntimeError)):
        job, loader = long_job(Hooks(), steps=2)

        def fail(*_, error=error):
            raise error

        job.model.add_gradients = fail  # type: ignore[method-assign]
        with pytest.raises(kind, match="16 tokens" if kind is UserError else "shapes"):
            train(job, loader, rows_per_step=4, device_batch_size=4)


def test_the_largest_pass_that_fits_is_found():
    model = random_model()  # context 64: 8,192 tokens are 128 rows
    healthy, tried = model.add_gradients, []

    def cramped(ids, targets, weights):
        tried.append(len(ids))
        if len(ids) > 20:
            raise MemoryError
        return healthy(ids, targets, weights)

    model.add_gradients = cramped  # type: ignore[method-assign]
    assert largest_that_fits(model, 1000) == 16
    assert tried == [128, 64, 32, 16]
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert largest_that_fits(model, 12) == 12


def test_a_row_of_metrics_tells_speed_and_gradient():
    hooks = Hooks()
    job, loader = long_job(hooks, steps=3, speed=Speed(2e6, 1e9))
    train(job, loader, rows_per_step=2)
    row = hooks.rows[1]
    assert row["tokens"] == 32 and row["gradient_norm"] > 0 and row["peak_memory_bytes"] > 1e7
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 2e6 / 1e9)
    assert row["eta"] == row["seconds"] and hooks.rows[2]["eta"] == 0
    assert 0 <= row["data_seconds"] <= row["seconds"]
