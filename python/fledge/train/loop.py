"""The one training loop of base, mid and sft: batches in, a better model out.

`train` runs the optimizer steps of a `Job`. What surrounds them (where files go, what is measured,
when to stop) comes in as `Hooks`, so that the loop knows neither runs nor tasks; `Job.end_step` is
shared with `train.rl`. The loss is normalised by the trained tokens of the whole global batch, so
it does not depend on how the batch is split into micro-steps; a batch with nothing to train on is
skipped and counted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fledge.data.loader import Loader
from fledge.errors import Interrupted, UserError
from fledge.model import Transformer
from fledge.optim.groups import Optimizers
from fledge.optim.schedule import Schedule

MAX_BAD_STEPS = 10  # consecutive non-finite losses after which training gives up

Row = dict[str, float]  # one row of metrics: "step" and what was measured


class Hooks(Protocol):
    """What a stage wants to happen around the steps."""

    def evaluate(self, step: int) -> Row:
        """Measurements after `step` steps; must leave the model in training mode."""
        ...

    def log(self, row: Row) -> None:
        """One row of metrics."""
        ...

    def save(self, step: int) -> None:
        """A checkpoint that holds everything needed to go on from `step`."""
        ...

    def stop_requested(self) -> bool:
        """True once the process was asked to stop."""
        ...

    def diverged(self, step: int) -> UserError:
        """What to tell the user whose loss stays non-finite up to `step`."""
        ...


@dataclass(frozen=True)
class Job:
    """What a loop is handed: a model to train from step `start` to the end of the schedule."""

    model: Transformer
    optimizers: Optimizers
    schedule: Schedule
    hooks: Hooks
    eval_every: int  # steps
    save_every: int
    start: int = 0

    def end_step(self, row: Row) -> None:
        """Measures, logs and saves when it is time; Interrupted, all saved, if asked to stop.

        While the loss is not finite no step is saved just because it is time, so that the last
        checkpoints stay sound.
        """
        step = int(row["step"])
        last = step == self.schedule.steps
        if step % self.eval_every == 0 or last:
            row |= self.hooks.evaluate(step)
        self.hooks.log(row)
        stopping = self.hooks.stop_requested()
        sound = math.isfinite(row.get("loss", 0.0))
        if (step % self.save_every == 0 and sound) or last or stopping:
            self.hooks.save(step)
        if stopping and not last:
            raise Interrupted(f"step {step} of {self.schedule.steps}")


def train(job: Job, loader: Loader, *, rows_per_step: int, device_batch_size: int) -> None:
    """Trains on the rows of a loader.

    Raises Interrupted after saving when a stop was requested, and what `Hooks.diverged` says when
    the loss stays non-finite for MAX_BAD_STEPS steps in a row.
    """
    model = job.model
    model.train()
    bad_steps = 0
    for step in range(job.start, job.schedule.steps):
        began = time.perf_counter()
        job.optimizers.follow(job.schedule, step)
        ids, mask = map(torch.from_numpy, loader.batch(rows_per_step))
        waited = time.perf_counter() - began
        loss, trained = accumulate(model, ids, mask, device_batch_size)
        bad_steps = 0 if math.isfinite(loss) else bad_steps + 1
        learns = trained > 0 and not bad_steps
        if learns:
            job.optimizers.step()
        else:
            job.optimizers.zero_grad()
        seconds = time.perf_counter() - began
        tokens = ids[:, 1:].numel()
        row: Row = {
            "step": step + 1,
            "loss": loss,
            "lr_factor": job.schedule.factor(step),
            "trained_tokens": trained,
            "tokens": tokens,
            "seconds": seconds,
            "data_seconds": waited,
            "tokens_per_second": tokens / seconds,
        }
        if not learns:
            row["skipped"] = 1
        if bad_steps == MAX_BAD_STEPS:
            job.hooks.log(row)
            raise job.hooks.diverged(step + 1)
        job.end_step(row)


def accumulate(
    model: Transformer, ids: Tensor, mask: Tensor, device_batch_size: int
) -> tuple[float, int]:
    """Gradients of the mean loss over the trained tokens; returns (loss in nats, tokens).

    ids and mask are [rows, T + 1]; mask 1 marks the tokens that are trained on.
    """
    weights = mask[:, 1:].to(torch.float32)
    tokens = int(weights.sum())
    if tokens == 0:
        return 0.0, 0
    device = model.cos.device
    total = 0.0
    shares = weights / tokens
    for at in range(0, ids.shape[0], device_batch_size):
        rows = ids[at : at + device_batch_size].to(device)
        part = shares[at : at + device_batch_size].to(device)
        total += model.add_gradients(rows[:, :-1], rows[:, 1:], part)
    return total, tokens
