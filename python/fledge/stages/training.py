"""What base, mid, sft and rl share: start or resume, train, measure, save, sample.

`TrainedStage` wires a training loop to a run directory: it begins at the newest checkpoint or with
the model of the stage before, and writes metrics and checkpoints. `run_training` runs the loop of
packed rows in it; the stage modules only say what they train on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fledge import files
from fledge.config import TRAINED_STAGES
from fledge.data.loader import COUNTED, Ahead, Documents, Loader
from fledge.errors import Interrupted, UserError
from fledge.evals import bpb
from fledge.model import Transformer
from fledge.model.precision import without_gradients
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.optim.sharded import ShardedOptimizers
from fledge.run import Run
from fledge.runlog import MetricsLog, NoMetrics
from fledge.stages.context import StageContext
from fledge.train import checkpoint
from fledge.train.loop import EvalHook, Job, train
from fledge.train.loss_scale import LossScale
from fledge.train.metrics import Row, Speed
from fledge.train.saving import Saver, host_copies
from fledge.train.watch import MAX_BAD_STEPS

KEEP_CHECKPOINTS = 2


class TrainedStage:
    """A stage's training in its run: the `job` for a loop, and the `Hooks` around its steps.

    It begins at the stage's newest checkpoint, whose state is then in `state`, else with the last
    model of the stage before, else with fresh weights. A context manager: it closes the metrics
    when training ends, however it ends.
    """

    def __init__(
        self,
        ctx: StageContext,
        stage: str,
        *,
        steps: int,
        resume: bool,
        evaluate: Callable[[Transformer], Row],
        loader_state: Callable[[], dict[str, Any]] = dict,
        also: Sequence[tuple[int, EvalHook]] = (),
    ) -> None:
        self.ctx, self.stage = ctx, stage
        self._evaluate, self._loader_state = evaluate, loader_state
        base: Any = ctx.recipe.base  # Any: a planned section has no absent values
        section: Any = getattr(ctx.recipe, stage)
        own = ctx.run.latest_checkpoint(stage) if resume else None
        earlier = TRAINED_STAGES[: TRAINED_STAGES.index(stage)]
        source = own or (ctx.run.latest_checkpoint(earlier[-1]) if earlier else None)
        if source is None:
            model = Transformer(ctx.run.model, seed=base.seed, device=ctx.device)
        else:
            checkpoint.verify(source)
            model = Transformer.load(source, device=ctx.device)
        dtype = ctx.recipe.hardware.dtype or "float32"
        if stage == "rl":  # its log-probabilities are compared with the sampler's
            dtype = without_gradients(dtype)
        again = ctx.recipe.hardware.checkpoint_activations or False
        model.compute_in(dtype, checkpoint_activations=again)
        share = getattr(section, "lr_scale", 1.0)
        rates, world = LearningRates.of(base).scaled(share), ctx.world
        optimizers = (
            ShardedOptimizers(model, rates, world) if world.size > 1 else Optimizers(model, rates)
        )
        # mid keeps base's momentum
        if source and not checkpoint.read_optimizers(source, optimizers) and source != own:
            ctx.progress.note(f"{stage}: {source} has no train_state; momentum starts at zero")
        self.saver = Saver(behind=ctx.recipe.hardware.async_checkpoints or False)
        self.state: dict[str, Any] = {"step": 0}
        if own is not None:
            self.state = checkpoint.read_state(own)
        ctx.world.wait()  # all have read it: now the leader may tidy up
        if own is not None and world.leads:
            drop_old_checkpoints(ctx.run, stage, section.save_every)  # a kill may have left one
        schedule = Schedule(
            steps,
            min(section.warmup_steps, steps // 2),
            section.cooldown_fraction,
            section.final_lr_fraction,
            base.cooldown_shape,
            base.decay_schedule,
            base.momentum_schedule,
        )
        start = self.state["step"]
        self.job = Job(
            model,
            optimizers,
            schedule,
            self,
            section.eval_every,
            section.save_every,
            start,
            speed=machine_speed(ctx.run),
            world=world,
            scale=LossScale(dynamic=dtype == "float16"),
            also=also,
        )
        self.job.watch.restore(self.state.get("watch", {}))
        self.job.scale.restore(self.state.get("loss_scale", {}))
        self.metrics = MetricsLog(ctx.run.metrics_file(stage)) if world.leads else NoMetrics()
        self.metrics.truncate_after(start)
        ctx.progress.stage(stage, steps, "steps", done=start, log=ctx.run.log_file(stage))
        ctx.progress.note(f"{stage}: computes in {dtype}")
        if own is not None:
            ctx.progress.note(f"{stage}: going on from step {start}")

    def evaluate(self, step: int) -> Row:
        return self._evaluate(self.job.model)

    def log(self, row: Row) -> None:
        self.metrics.append(row)
        shown = {k: row[k] for k in ("loss", "bpb", "reward", "tokens_per_second") if k in row}
        self.ctx.progress.update(row["step"], **shown)

    def save(self, step: int) -> None:
        """Writes a whole checkpoint, then points LATEST at it, then drops the oldest.

        Of several ranks the leader writes; the optimizers' state is gathered by all. Where
        checkpoints are asynchronous training goes on while it writes; the next one waits for it.
        """
        tensors = self.job.optimizers.state_tensors()
        if self.ctx.world.leads:
            self._write(step, tensors)
        if not self.saver.behind:
            self.ctx.world.wait()

    def _write(self, step: int, tensors: dict[str, Tensor]) -> None:
        self.saver.wait()
        self.metrics.sync()
        model, target = self.job.model, self.ctx.run.checkpoint_dir(self.stage, step)
        needed = 4 * sum(p.numel() for p in model.parameters()) * 3  # weights and two moments
        files.require_free_bytes(target, int(needed * 1.1))
        state = {"step": step, "watch": self.job.watch.state(), **self._loader_state()}
        if self.job.scale.dynamic:
            state["loss_scale"] = self.job.scale.state()
        weights: dict[str, Tensor] | None = None
        if self.saver.behind:
            weights = host_copies(dict(model.named_parameters()))
            tensors = host_copies(tensors)
        self.saver.submit(lambda: self._write_files(step, state, tensors, weights))

    def _write_files(
        self,
        step: int,
        state: dict[str, Any],
        tensors: dict[str, Tensor],
        weights: dict[str, Tensor] | None,
    ) -> None:
        run, tokenizer = self.ctx.run, self.ctx.tokenizer
        with files.atomic_directory(run.checkpoint_dir(self.stage, step)) as folder:
            tokenizer.save(folder)
            checkpoint.write(
                folder,
                model=self.job.model,
                optimizers=self.job.optimizers,
                state=state,
                token_ids={
                    "bos_token_id": tokenizer.bos_id,
                    "eos_token_id": tokenizer.eos_id,
                    "pad_token_id": tokenizer.pad_id,
                },
                tensors=tensors,
                weights=weights,
            )
        run.set_latest(self.stage, step)
        drop_old_checkpoints(run, self.stage, self.job.save_every)

    def stop_requested(self) -> bool:
        """Agreed by all ranks: a signal reaches them at different moments."""
        asked, device = self.ctx.stop.requested, self.job.model.cos.device
        return self.ctx.world.sum_number(float(asked), device) > 0

    def note(self, text: str) -> None:
        self.ctx.progress.note(f"{self.stage}: {text}")

    def restore(self) -> int | None:
        """Weights and optimizers of this stage's newest checkpoint; None if it has none yet."""
        self.saver.wait()
        self.ctx.world.wait()  # every rank then sees the same newest one
        latest = self.ctx.run.latest_checkpoint(self.stage)
        if latest is None:
            return None
        checkpoint.verify(latest)
        self.job.model.load_weights(latest)
        self.job.optimizers.forget()
        checkpoint.read_optimizers(latest, self.job.optimizers)
        return checkpoint.read_state(latest)["step"]

    def diverged(self, step: int) -> UserError:
        keys = (
            "base.matrix_lr and base.embed_lr" if self.stage == "base" else f"{self.stage}.lr_scale"
        )
        self.saver.wait()
        latest = self.ctx.run.latest_checkpoint(self.stage)
        kept = f"; {latest.name} is kept until then" if latest is not None else ""
        return UserError(
            f"{self.stage} diverged: up to step {step} the loss was {MAX_BAD_STEPS} times in a row "
            "not a finite number",
            "most often a learning rate is too high for this network and batch",
            f"lower {keys} and run again with --restart {self.stage}{kept}",
        )

    def __enter__(self) -> TrainedStage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, Interrupted):
                self.saver.wait()
                self.ctx.world.wait()  # a rank that ended now would have the leader ended, too
            elif not issubclass(kind, KeyboardInterrupt):
                with contextlib.suppress(Exception):  # the first error says more
                    self.saver.wait()
        finally:
            self.metrics.close()


def machine_speed(run: Run) -> Speed | None:
    """What MFU is taken against: the plan's FLOPs a token and the machine's measured or rated peak.

    None where the peak of a CPU is only assumed: a share of a guess says nothing.
    """
    hardware, known = run.resolved["hardware"], run.resolved["estimates"]
    if hardware["device"] == "cpu":
        peak = hardware["matmul_flops"] if hardware["source"] == "measured" else 0.0
    else:
        peak = hardware["peak_flops"] * hardware["device_count"]
    return Speed(known["flops_per_token"], peak) if peak else None


def drop_old_checkpoints(run: Run, stage: str, save_every: int) -> None:
    """Keeps the newest checkpoint and the last ones of the regular steps before it.

    One that was saved between two regular steps because the process was asked to stop goes as soon
    as there is a newer one, so that an interrupted run ends with the files of an uninterrupted one.
    """
    latest = run.latest_checkpoint(stage)
    if latest is None:
        return
    found = {p: int(p.name[5:]) for p in latest.parent.iterdir() if p.name[5:].isdigit()}
    older = [p for p, step in found.items() if step < found[latest] and step % save_every == 0]
    kept = {latest, *sorted(older)[1 - KEEP_CHECKPOINTS :]}
    for old in sorted(set(found) - kept):
        files.remove_whole(old)


def run_training(
    ctx: StageContext,
    stage: str,
    *,
    documents: Documents,
    validation: Documents,
    split: bool,
    resume: bool,
    also: Sequence[tuple[int, EvalHook]] = (),
) -> Transformer:
    """Trains one stage on packed rows of `documents`; returns the trained model. `also`: what is
    measured every so many steps beside bits per byte."""
    section: Any = getattr(ctx.recipe, stage)
    base: Any = ctx.recipe.base
    context, pad = ctx.run.model.max_position_embeddings, ctx.tokenizer.pad_id
    rows = section.global_batch_tokens // context
    device_rows = min(rows, section.device_batch_size)
    loader = Loader(documents, row_tokens=context, pad_id=pad, split=split)
    held_out = Loader(validation, row_tokens=context, pad_id=pad, split=split)
    validation_set = bpb.ValidationSet.take(held_out, base.eval_tokens)
    byte_counts = bpb.token_byte_counts(ctx.tokenizer)

    def evaluate(model: Transformer) -> Row:
        losses = bpb.measure(
            model, validation_set, byte_counts, device_batch_size=device_rows, world=ctx.world
        )
        return {"bpb": losses.bpb, "validation_loss": losses.loss}

    ahead = Ahead(loader, rows)
    with TrainedStage(
        ctx,
        stage,
        steps=max(1, section.tokens // section.global_batch_tokens),
        resume=resume,
        evaluate=evaluate,
        loader_state=lambda: {"loader": ahead.state()},
        also=also,
    ) as training:
        if "loader" in training.state:
            loader.restore(training.state["loader"])
        with ahead:
            train(training.job, ahead, rows_per_step=rows, device_batch_size=device_rows)
    read = ahead.state()
    share = read["padded"] / max(1, read["total"])
    ctx.progress.note(f"{stage}: {share:.1%} of the row positions were padding")
    tables = read["conversations"]
    if tables:
        total = {name: sum(table[name] for table in tables) for name in COUNTED}
        ctx.progress.note(
            f"{stage}: {total['read']:,} conversations read; {total['shortened']:,} were longer "
            f"than {context} tokens and kept whole turns only ({section.long_chats}), "
            f"{total['dropped']:,} did not fit at all, {total['untrained']:,} had nothing to learn"
        )
    return training.job.model


def write_samples(ctx: StageContext, stage: str, title: str, pairs: list[tuple[str, str]]) -> None:
    """samples.md of a stage: what was asked or begun, and how the model went on."""
    lines = [f"# {title}", ""]
    for prompt, reply in pairs:
        lines += [f"**{prompt.strip()}**", "", "> " + reply.strip().replace("\n", "\n> "), ""]
    files.write_text(ctx.run.samples_file(stage), "\n".join(lines))
