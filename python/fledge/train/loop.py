"""The one training loop of base, mid and sft: batches in, a better model out.

`train` runs the optimizer steps of a `Job`. What surrounds them (where files go, what is measured,
when to stop) comes in as `Hooks`, so that the loop knows neither runs nor tasks; `Job.end_step` is
shared with `train.rl`. The loss is normalised by the trained tokens of the whole global batch, so
it does not depend on how the batch is split into micro-steps. A batch with nothing to train on is
skipped and counted, so is one whose loss is not finite or far too high (`train.watch`); a pass that
does not fit into memory is made again in halves, one whose gradients are too large for float16 at
half the scale (`train.loss_scale`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fledge.data.loader import Batches
from fledge.dist import World
from fledge.errors import Interrupted, UserError
from fledge.model import Transformer
from fledge.optim.groups import Optimizers
from fledge.optim.schedule import Schedule
from fledge.train.loss_scale import LossScale
from fledge.train.metrics import Row, Speed, timing
from fledge.train.watch import LossWatch, Verdict

CPU_TOKENS_PER_PASS = 8192  # beyond this a CPU gains nothing


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

    def restore(self) -> int | None:
        """Puts weights and optimizers back to the newest checkpoint; its step, None without one."""
        ...

    def note(self, text: str) -> None:
        """One line for the reader of the log."""
        ...

    def diverged(self, step: int) -> UserError:
        """What to tell the user whose loss stays non-finite up to `step`."""
        ...


EvalHook = Callable[[Transformer, int], Row]
"""A measurement after some steps: collective, and it leaves the model, its mode and all random
numbers as they were."""


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
    watch: LossWatch = field(default_factory=LossWatch)
    speed: Speed | None = None
    world: World = field(default_factory=World)
    scale: LossScale = field(default_factory=LossScale)
    also: Sequence[tuple[int, EvalHook]] = ()
    """(every so many steps, what is measured beside `Hooks.evaluate`)."""

    def finish_gradients(self, loss: float, trained: int, step: int) -> tuple[float, float] | None:
        """(loss, gradient norm) of a step over all ranks, after its passes; None: make them again.

        `loss` is this rank's part, `trained` the tokens of the whole step. The gradients are then
        those of the loss itself, of whatever scale it was multiplied by.
        """
        loss, norm = self.world.sum_number(loss, self.model.cos.device), 0.0
        if trained:
            self.optimizers.reduce_gradients()
            self.optimizers.scale_gradients(1.0 / self.scale.value)
            norm = self.optimizers.gradient_norm()
        if self.scale.overflowed(loss, norm):
            self.optimizers.zero_grad()
            self.hooks.note(
                f"step {step}: gradients beyond float16; again with a loss scale of "
                f"{self.scale.value:,.0f}"
            )
            return None
        return loss, norm

    def end_step(self, row: Row) -> None:
        """Measures, logs and saves when it is time; Interrupted, all saved, if asked to stop.

        While the loss is not finite no step is saved just because it is time, so that the last
        checkpoints stay sound.
        """
        step = int(row["step"])
        last = step == self.schedule.steps
        if step % self.eval_every == 0 or last:
            row |= self.hooks.evaluate(step)
        for every, measure in self.also:
            if step % every == 0 or last:
                row |= measure(self.model, step)
        self.hooks.log(row)
        stopping = self.hooks.stop_requested()
        sound = all(math.isfinite(row.get(key, 0.0)) for key in ("loss", "policy_loss"))
        if (step % self.save_every == 0 and sound) or last or stopping:
            self.hooks.save(step)
        if stopping and not last:
            raise Interrupted(f"step {step} of {self.schedule.steps}")


def train(
    job: Job, loader: Batches, *, rows_per_step: int, device_batch_size: int | None = None
) -> None:
    """Trains on the rows of a loader; device_batch_size None = the largest that fits.

    Raises Interrupted after saving when a stop was requested, and what `Hooks.diverged` says when
    the loss stays bad in spite of skipping and rolling back.
    """
    model = job.model
    model.train()
    size = device_batch_size or largest_that_fits(model, rows_per_step)
    for step in range(job.start, job.schedule.steps):
        began = time.perf_counter()
        job.optimizers.follow(job.schedule, step)
        ids, mask = map(torch.from_numpy, loader.batch(rows_per_step))
        waited = time.perf_counter() - began
        found = None
        while found is None:
            loss, trained, size = accumulate_within_memory(job, ids, mask, size)
            found = job.finish_gradients(loss, trained, step + 1)
        loss, norm = found
        learns = trained > 0 and job.watch.judge(loss, norm) is Verdict.GOOD
        if learns:
            job.optimizers.step()
            job.scale.good_step()
        else:
            job.optimizers.zero_grad()
        tokens = ids[:, 1:].numel()
        row: Row = {
            "step": step + 1,
            "loss": loss,
            "lr_factor": job.schedule.factor(step),
            "gradient_norm": norm,
            "trained_tokens": trained,
            "tokens": tokens,
            **timing(
                tokens=tokens,
                seconds=time.perf_counter() - began,
                waited=waited,
                steps_left=job.schedule.steps - step - 1,
                speed=job.speed,
            ),
        }
        if not learns:
            row["skipped"] = 1
        if job.scale.dynamic:
            row["loss_scale"] = job.scale.value
        recover(job, row)
        job.end_step(row)


def recover(job: Job, row: Row, *, key: str = "loss") -> None:
    """Says what was skipped, goes back to a checkpoint when the weights are suspected, gives up.

    To be called after `job.watch` has judged the step whose loss is `row[key]`.
    """
    watch, step = job.watch, int(row["step"])
    if not watch.bad_in_row or not row["trained_tokens"]:
        return
    job.hooks.note(
        f"step {step} was skipped: {key.replace('_', ' ')} {row[key]:.4g}, gradient norm "
        f"{row['gradient_norm']:.3g}"
        + (f", mean loss before {watch.mean:.4g}" if key == "loss" else "")
    )
    broken = not math.isfinite(row[key])
    if watch.suspects_weights or (broken and step == job.schedule.steps):
        restored = job.hooks.restore()
        if restored is not None:
            watch.rollbacks += 1
            row["rolled_back_to"] = restored
            job.hooks.note(
                f"after {watch.bad_in_row} bad steps in a row: back to the weights of step "
                f"{restored}, on with the next batch"
            )
    if watch.hopeless:
        job.hooks.log(row)
        raise job.hooks.diverged(step)


def accumulate(
    model: Transformer,
    ids: Tensor,
    mask: Tensor,
    device_batch_size: int,
    *,
    share: slice = slice(None),
    scale: float = 1.0,
) -> tuple[float, int]:
    """Gradients of `scale` x the mean loss over the trained tokens; returns (loss, tokens).

    ids and mask are [rows, T + 1]; mask 1 marks the tokens that are trained on. The rows need not
    be a multiple of device_batch_size: every token has the same weight whatever the split. `share`
    is the rows that this rank computes; its loss, in nats, is then its part of the mean.
    """
    weights = mask[:, 1:].to(model.dtype)
    tokens = int(mask[:, 1:].sum())
    if tokens == 0:
        return 0.0, 0
    device = model.cos.device
    total = 0.0
    ids, shares = ids[share], (weights / tokens)[share] * scale
    for at in range(0, ids.shape[0], device_batch_size):
        rows = ids[at : at + device_batch_size].to(device)
        part = shares[at : at + device_batch_size].to(device)
        total += model.add_gradients(rows[:, :-1], rows[:, 1:], part)
    return total / scale, tokens


def accumulate_within_memory(
    job: Job, ids: Tensor, mask: Tensor, size: int
) -> tuple[float, int, int]:
    """`accumulate`, again with half the rows per pass as long as memory does not suffice.

    Returns (loss, tokens, rows per pass that worked). UserError if not even one row fits.
    """
    size = min(size, ids.shape[0])
    while True:
        try:
            share = job.world.share(ids.shape[0])
            scale = job.scale.value
            return *accumulate(job.model, ids, mask, size, share=share, scale=scale), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # outside of the except: the traceback holds the tensors of the pass that failed
        job.optimizers.zero_grad()
        _give_back(job.model)
        if size == 1:
            raise UserError(
                f"one row of {ids.shape[1] - 1} tokens does not fit into the memory",
                "the pass for a single row ran out of it",
                "choose a smaller model.depth, model.max_seq_len or tokenizer.vocab_size",
            )
        size = (size + 1) // 2
        job.hooks.note(f"out of memory: going on with {size} rows at a time, the same numbers")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: can't allocate memory" in text or "out of memory" in text
    )


def _give_back(model: Transformer) -> None:
    """Frees what a failed pass left behind."""
    model.workspace.drop()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_that_fits(model: Transformer, rows_per_step: int) -> int:
    """Rows per pass, found by trying: halved from the rows of a step until a pass fits.

    On a CPU it begins at 8,192 tokens. Leaves gradients at zero.
    """
    context = model.config.max_position_embeddings
    device = model.cos.device
    rows = rows_per_step
    if device.type == "cpu":
        rows = min(rows, max(1, CPU_TOKENS_PER_PASS // context))
    while rows > 1:
        ids = torch.zeros(rows, context, dtype=torch.long, device=device)
        try:
            model.add_gradients(ids, ids, torch.ones(rows, context, device=device))
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        model.zero_grad(set_to_none=False)
        if fits:
            break
        _give_back(model)
        rows //= 2
    return rows
