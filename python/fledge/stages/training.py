"""What base, mid and sft share: start or resume, train, measure, save, sample.

`run_training` wires the one training loop to a run directory: it loads the newest checkpoint or the
starting weights, feeds `train.loop.train`, and writes metrics, checkpoints and samples. The three
stage modules only say what they train on. Checkpoint saving serves `stages.rl` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fledge import files
from fledge.config import BaseSection, ChatSection
from fledge.data.loader import Documents, Loader
from fledge.engine import Engine, SamplingParams
from fledge.evals import bpb
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.run import Run
from fledge.runlog import MetricsLog
from fledge.stages.context import StageContext
from fledge.tokenizer import Tokenizer
from fledge.train import checkpoint
from fledge.train.loop import Cadence, train

KEEP_CHECKPOINTS = 2


@dataclass
class Start:
    """Where a stage begins: weights, optimizer state, step and the rest of the saved state."""

    model: Transformer
    optimizers: Optimizers
    step: int
    state: dict[str, Any]


def peak_rates(section: BaseSection) -> LearningRates:
    """The peak learning rates of pretraining, of which later stages take a share."""
    assert section.matrix_lr is not None and section.embed_lr is not None
    assert section.head_lr is not None and section.norm_lr is not None
    assert section.weight_decay is not None
    return LearningRates(
        section.matrix_lr,
        section.embed_lr,
        section.head_lr,
        section.norm_lr,
        section.weight_decay,
    )


def start_or_resume(
    ctx: StageContext,
    stage: str,
    *,
    resume: bool,
    previous: str | None,
    lr_scale: float,
    save_every: int,
) -> Start:
    """The newest checkpoint of this stage, else the previous stage's last, else fresh weights."""
    own = ctx.run.latest_checkpoint(stage) if resume else None
    before = ctx.run.latest_checkpoint(previous) if previous is not None else None
    source = own or before
    if source is None:
        model = Transformer(ctx.run.model, seed=ctx.recipe.base.seed)
    else:
        checkpoint.verify(source)
        model = Transformer.load(source)
    model.to(ctx.device)
    optimizers = Optimizers(model, peak_rates(ctx.recipe.base).scaled(lr_scale))
    if source is not None:
        has_state = checkpoint.read_optimizers(source, optimizers)  # mid keeps base's momentum
        if not has_state and own is None:
            ctx.progress.note(f"{stage}: {source} has no train_state; momentum starts at zero")
    if own is None:
        return Start(model, optimizers, 0, {})
    drop_old_checkpoints(ctx.run, stage, save_every=save_every)  # a kill may have left one
    state = checkpoint.read_state(own)
    ctx.progress.note(f"{stage}: going on from step {state['step']}")
    return Start(model, optimizers, state["step"], state)


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special ids that config.json and generation_config.json name."""
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def save_checkpoint(
    ctx: StageContext,
    stage: str,
    step: int,
    *,
    model: Transformer,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    save_every: int,
) -> None:
    """Writes a whole checkpoint, then points LATEST at it, then drops the oldest."""
    target = ctx.run.checkpoint_dir(stage, step)
    needed = 4 * sum(p.numel() for p in model.parameters()) * 3  # weights and two moments
    files.require_free_bytes(target, int(needed * 1.1))
    with files.atomic_directory(target) as folder:
        tokenizer.save(folder)
        checkpoint.write(
            folder,
            model=model,
            optimizers=optimizers,
            state={"step": step, **state},
            token_ids=token_ids(tokenizer),
        )
        checkpoint.seal(folder)
    ctx.run.set_latest(stage, step)
    drop_old_checkpoints(ctx.run, stage, save_every=save_every)


def drop_old_checkpoints(run: Run, stage: str, *, save_every: int) -> None:
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


class TrainingHooks:
    """The loop's surroundings in a run: metrics, progress, validation, checkpoints.

    A context manager: it closes the metrics when training ends, however it ends.
    """

    def __init__(
        self,
        ctx: StageContext,
        stage: str,
        *,
        evaluate: Callable[[], dict[str, float]],
        save: Callable[[int], None],
    ) -> None:
        self.ctx = ctx
        self.metrics = MetricsLog(ctx.run.metrics_file(stage))
        self._evaluate = evaluate
        self._save = save

    def evaluate(self, step: int) -> dict[str, float]:
        return self._evaluate()

    def log(self, row: dict[str, float | int]) -> None:
        self.metrics.append(row)
        shown = {k: row[k] for k in ("loss", "bpb", "reward", "tokens_per_second") if k in row}
        self.ctx.progress.update(row["step"], **shown)

    def save(self, step: int) -> None:
        self.metrics.sync()
        self._save(step)

    def stop_requested(self) -> bool:
        return self.ctx.stop.requested

    def __enter__(self) -> TrainingHooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()


def run_training(
    ctx: StageContext,
    stage: str,
    *,
    section: BaseSection | ChatSection,
    documents: Documents,
    validation: Documents,
    split: bool,
    previous: str | None,
    resume: bool,
) -> Transformer:
    """Trains one stage on packed rows of `documents`; returns the trained model."""
    tokenizer = ctx.tokenizer()
    base = ctx.recipe.base
    context = ctx.run.model.max_position_embeddings
    batch_tokens = section.global_batch_tokens
    assert batch_tokens is not None and section.tokens is not None
    assert section.eval_every is not None and section.save_every is not None
    assert base.eval_tokens is not None
    rows = max(1, batch_tokens // context)
    lr_scale = getattr(section, "lr_scale", None)
    start = start_or_resume(
        ctx,
        stage,
        resume=resume,
        previous=previous,
        lr_scale=1.0 if lr_scale is None else lr_scale,
        save_every=section.save_every,
    )
    schedule = schedule_of(section, steps=max(1, section.tokens // (rows * context)))
    pad, device_rows = tokenizer.pad_id, min(rows, section.device_batch_size or rows)
    loader = Loader(documents, row_tokens=context, pad_id=pad, split=split)
    if "loader" in start.state:
        loader.restore(start.state["loader"])
    held_out = Loader(validation, row_tokens=context, pad_id=pad, split=split)
    validation_set = bpb.ValidationSet.take(held_out, base.eval_tokens)
    byte_counts = bpb.token_byte_counts(tokenizer)
    cadence = Cadence(rows, device_rows, section.eval_every, section.save_every)

    def evaluate() -> dict[str, float]:
        losses = bpb.measure(
            start.model, validation_set, byte_counts, device_batch_size=device_rows
        )
        return {"bpb": losses.bpb, "validation_loss": losses.loss}

    def save(step: int) -> None:
        save_checkpoint(
            ctx,
            stage,
            step,
            model=start.model,
            optimizers=start.optimizers,
            tokenizer=tokenizer,
            state={"loader": loader.state()},
            save_every=cadence.save_every,
        )

    log = ctx.run.log_file(stage)
    with TrainingHooks(ctx, stage, evaluate=evaluate, save=save) as hooks:
        hooks.metrics.truncate_after(start.step)
        ctx.progress.stage(stage, schedule.steps, "steps", done=start.step, log=log)
        train(
            model=start.model,
            optimizers=start.optimizers,
            loader=loader,
            schedule=schedule,
            cadence=cadence,
            hooks=hooks,
            start=start.step,
        )
    share = loader.padded / max(1, loader.total)
    ctx.progress.note(f"{stage}: {share:.1%} of the row positions were padding")
    return start.model


def schedule_of(section: Any, *, steps: int) -> Schedule:
    """The learning-rate schedule of a section whose planned values are filled in."""
    return Schedule(
        steps,
        min(section.warmup_steps, steps // 2),
        section.cooldown_fraction,
        section.final_lr_fraction,
    )


def write_samples(path: Path, title: str, pairs: list[tuple[str, str]]) -> None:
    """samples.md of a stage: what was asked or begun, and how the model went on."""
    lines = [f"# {title}", ""]
    for prompt, reply in pairs:
        lines += [f"**{prompt.strip()}**", "", "> " + reply.strip().replace("\n", "\n> "), ""]
    files.write_text(path, "\n".join(lines))


def continuations(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], *, max_tokens: int = 48
) -> list[tuple[str, str]]:
    """Greedy continuations of raw text; a prompt longer than half the context is cut short."""
    model.eval()
    engine = Engine(model, tokenizer)
    room = model.config.max_position_embeddings // 2
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)][:room] for prompt in prompts]
    with torch.inference_mode():
        done = engine.generate(ids, SamplingParams(max_tokens=max_tokens))
    return [
        (prompt, prompt + tokenizer.decode(_without_end(completion.ids, engine.stop_ids)))
        for prompt, (completion,) in zip(prompts, done, strict=True)
    ]


def _without_end(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
