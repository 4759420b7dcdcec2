"""The one training loop of base, mid and sft: batches in, a better model out.

`train` runs optimizer steps from `start` to `schedule.steps`. What surrounds it (where files go,
what is measured, when to stop) comes in as `Hooks`, so that the loop knows neither runs nor tasks.
The loss is normalised by the trained tokens of the whole global batch, so it does not depend on
how the batch is split into micro-steps; a batch with nothing to train on is skipped and counted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fledge.data.loader import Loader
from fledge.errors import Interrupted
from fledge.model import Transformer
from fledge.optim.groups import Optimizers
from fledge.optim.schedule import Schedule

MAX_BAD_STEPS = 10  # consecutive non-finite steps after which training gives up


class Hooks(Protocol):
    """What a stage wants to happen around the steps."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Measurements after `step` steps; must leave the model in training mode."""
        ...

    def log(self, row: dict[str, float | int]) -> None:
        """One row of metrics."""
        ...

    def save(self, step: int) -> None:
        """A checkpoint that holds everything needed to go on from `step`."""
        ...

    def stop_requested(self) -> bool:
        """True once the process was asked to stop."""
        ...


@dataclass(frozen=True)
class Cadence:
    """Batch shape and how often to measure and save (in steps)."""

    rows_per_step: int
    device_batch_size: int
    eval_every: int
    save_every: int


def train(
    *,
    model: Transformer,
    optimizers: Optimizers,
    loader: Loader,
    schedule: Schedule,
    cadence: Cadence,
    hooks: Hooks,
    start: int = 0,
) -> None:
    """Trains from step `start` to the end of the schedule.

    Raises Interrupted after saving when a stop was requested, RuntimeError when the loss stays
    non-finite for MAX_BAD_STEPS steps in a row.
    """
    model.train()
    bad_steps = 0
    for step in range(start, schedule.steps):
        began = time.perf_counter()
        optimizers.set_lr(schedule.factor(step))
        ids, mask = loader.batch(cadence.rows_per_step)
        waited = time.perf_counter() - began
        loss, tokens = accumulate(
            model, torch.from_numpy(ids), torch.from_numpy(mask), cadence.device_batch_size
        )
        finite = math.isfinite(loss)
        if tokens and finite:
            optimizers.step()
            bad_steps = 0
        else:
            model.zero_grad(set_to_none=True)
            bad_steps += 1
        seconds = time.perf_counter() - began
        done = step + 1
        row: dict[str, float | int] = {
            "step": done,
            "loss": loss,
            "lr_factor": schedule.factor(step),
            "trained_tokens": tokens,
            "tokens": ids.shape[0] * (ids.shape[1] - 1),
            "seconds": seconds,
            "data_seconds": waited,
            "tokens_per_second": ids.shape[0] * (ids.shape[1] - 1) / seconds,
        }
        if not (tokens and finite):
            row["skipped"] = 1
        last = done == schedule.steps
        if done % cadence.eval_every == 0 or last:
            row |= hooks.evaluate(done)
        hooks.log(row)
        if bad_steps >= MAX_BAD_STEPS:
            raise RuntimeError(f"the loss was not finite for {bad_steps} steps up to step {done}")
        stopping = hooks.stop_requested()
        if done % cadence.save_every == 0 or last or stopping:
            hooks.save(done)
        if stopping and not last:
            raise Interrupted(f"step {done} of {schedule.steps}")


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
    for at in range(0, ids.shape[0], device_batch_size):
        rows = ids[at : at + device_batch_size].to(device)
        loss = model.loss_sum(
            rows[:, :-1], rows[:, 1:], weights[at : at + device_batch_size].to(device)
        )
        (loss / tokens).backward()
        total += loss.item()
    return total / tokens, tokens
