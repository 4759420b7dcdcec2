"""`fledge run`: from a recipe to a chat model; what is unfinished is done, what is done is skipped.

The pipeline resolves the plan, opens the run, and takes the stages in order; each is a function of
a `StageContext`. In a world of several processes rank 0 leads: it holds the run, decides, and tells
the others, who share base, mid, sft, rl and evaluate with it. It owns nothing of what a stage
does: it decides skip, resume or start by fingerprint, records how a stage ended, and renders the
report.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from fledge import dist, files, report
from fledge.config import STAGES, Recipe
from fledge.dist import World
from fledge.errors import Interrupted, UserError
from fledge.plan import hardware, planner
from fledge.progress import Progress, Silence
from fledge.run import Run
from fledge.runlog import StopRequest
from fledge.stages import base, evaluate, mid, rl, sft, tokenizer
from fledge.stages.context import StageContext, peak_memory_bytes
from fledge.stages.material import Material, open_material
from fledge.stages.own_files import require_rewards, stage_manifest
from fledge.stages.probe import known_speed, plan_at_measured_speed

STAGE_FUNCTIONS: dict[str, Callable[..., None]] = {
    "tokenizer": tokenizer.run,
    "base": base.run,
    "mid": mid.run,
    "sft": sft.run,
    "rl": rl.run,
    "evaluate": evaluate.run,
}

MOST_THREADS = 1024


def run_recipe(
    recipe: Recipe,
    name: str,
    out: Path,
    *,
    until: str | None = None,
    restart: str | None = None,
    rehearsal: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
) -> Run:
    """Carries a run through its stages (up to `until`) and returns it.

    rehearsal: what the run rehearses, kept in resolved.json (plan/rehearsal.py); origin: how it was
    asked for (`resolved.describe`).
    Raises UserError for what the user can mend, Interrupted (after saving) when asked to stop.
    """
    for stage in (until, restart):
        if stage is not None and stage not in STAGES:
            raise UserError(
                f"there is no stage called {stage!r}",
                f"the stages are {', '.join(STAGES)}",
                "name one of them",
            )
    machine = hardware.detect()
    if recipe.base.minutes is not None:
        machine = dataclasses.replace(machine, training_flops=known_speed(recipe, out))
    plan = dataclasses.replace(planner.resolve(recipe, machine), rehearsal=rehearsal)
    device = prepare_machine(plan.values["hardware.device"], plan.values["hardware.threads"])
    with dist.joined(device) as world:
        if world.leads:
            material = open_material(recipe)  # before the run exists: bad data leaves nothing
            if recipe.rl.steps != 0:
                require_rewards(recipe, material.problem(0))
            require_room(plan, out)
            if recipe.base.minutes is not None and machine.training_flops is None:
                plan = plan_at_measured_speed(recipe, plan, device, world.size)
        world.wait()  # what the leader had to fetch is there now
        if not world.leads:
            return _follow(open_material(recipe), out, device, world, until)
        run = Run.open(out, name, recipe, plan, origin=origin)
        with run, StopRequest() as stop, Progress(planner.stage_seconds(plan)) as progress:
            if restart is not None:
                # refuse before anything is thrown away
                for stage in STAGES[: STAGES.index(restart)]:
                    data = material.manifest() | stage_manifest(run.recipe, stage)
                    run.stage_state(stage, run.stage_parts(stage, data=data))
                run.restart(restart)
            world.tell(run.resolved)
            for note in material.notes:
                progress.note(note)
            notes = list(material.notes)
            ctx = StageContext(run, run.recipe, material, progress, stop, device, notes, world)
            for stage in _stages(until):
                run_stage(ctx, stage)
            progress.note("writing the report")
            report.render(run)
        return run


def _stages(until: str | None) -> tuple[str, ...]:
    last = STAGES.index(until) if until is not None else len(STAGES) - 1
    return STAGES[: last + 1]


ALONE = ("tokenizer",)
"""Stages that rank 0 takes while the others wait."""


def _follow(material: Material, out: Path, device: str, world: World, until: str | None) -> Run:
    """What a rank that does not lead does: the shared stages that the leader announces."""
    with StopRequest() as stop, Silence() as progress:
        # not from the file: what only concerns the execution is there when a stage begins
        resolved = world.tell(None)
        for stage in _stages(until):
            state = world.tell(None)
            if state in ("resume", "start") and stage not in ALONE:
                run = Run(out, resolved)
                ctx = StageContext(run, run.recipe, material, progress, stop, device, [], world)
                STAGE_FUNCTIONS[stage](ctx, resume=state == "resume")
            world.wait()
    return Run.read(out)


def run_stage(ctx: StageContext, stage: str) -> None:
    """Skips, resumes or starts one stage and records how it ended; other ranks are told."""
    run = ctx.run
    why = _not_needed(ctx.recipe, ctx.material, stage)
    if why is not None and run.read_stage(stage) is None:
        ctx.progress.skip(stage, why)
        ctx.notes.append(f"{stage}: {why}")
        ctx.world.tell("skip")
        ctx.world.wait()
        return
    data = ctx.material.manifest() | stage_manifest(ctx.recipe, stage)
    parts = run.stage_parts(stage, data=data)
    state = run.stage_state(stage, parts)
    if state == "skip":
        ctx.progress.skip(stage)
    else:
        run.begin_stage(stage, parts)
    ctx.world.tell(state)
    if state != "skip":
        alone = stage in ALONE and ctx.world.size > 1
        _take(dataclasses.replace(ctx, world=World()) if alone else ctx, stage, state)
    ctx.world.wait()


def _take(ctx: StageContext, stage: str, state: str) -> None:
    """Runs the stage's function and records how it ended."""
    run, began = ctx.run, time.monotonic()

    def end(
        status: Literal["done", "interrupted", "failed"], error: BaseException | None = None
    ) -> None:
        run.end_stage(
            stage,
            status,
            seconds=time.monotonic() - began,
            peak_memory_bytes=peak_memory_bytes(),
            notes=ctx.notes,
            error=None if error is None else f"{type(error).__name__}: {error}"[:1000],
        )

    try:
        ctx.stop.raise_if_requested(stage)
        STAGE_FUNCTIONS[stage](ctx, resume=state == "resume")
    except (Interrupted, KeyboardInterrupt):
        end("interrupted")
        raise
    except BaseException as error:
        if dist.lost_a_peer(error):
            end("interrupted", error)
            raise
        with contextlib.suppress(UserError):  # on a full disk the first error says more
            end("failed", error)
        raise
    end("done")


def _not_needed(recipe: Recipe, material: Material, stage: str) -> str | None:
    """Why a stage is left out of this run, or None."""
    if stage != "rl":
        return None
    if recipe.rl.steps == 0:
        return "left out (rl.steps = 0)"
    if material.problem(0) is None:
        return "left out: the data has no problems with checkable answers"
    return None


def require_room(plan: planner.Plan, out: Path) -> None:
    """UserError if memory, or the disk of a new run, is far too small for the plan."""
    machine, needed = plan.hardware, plan.estimates["memory_bytes"]
    if needed > machine.device_memory_bytes:
        raise UserError(
            "this model does not fit into the memory of this machine",
            f"training it takes about {needed / 1e9:,.1f} GB, and {machine.name} has "
            f"{machine.device_memory_bytes / 1e9:,.1f} GB",
            "give a smaller --model.depth, --model.max_seq_len or --tokenizer.vocab_size",
        )
    if not Run.is_run(out):
        files.require_free_bytes(out, plan.estimates["disk_bytes"], purpose="this run")


def prepare_machine(device: str | None, threads: int | None) -> str:
    """Sets threads and memory behaviour; returns the device that will be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # before anything opens the first one for every rank
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"the device {device!r} cannot be used", str(error).splitlines()[0], "use cpu"
        ) from None
    if threads is not None and threads > MOST_THREADS:
        raise UserError(
            f"hardware.threads = {threads}", "no machine has as many", "leave it out: all cores"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # ranks that share the cores
    torch.set_num_threads(max(1, (threads or hardware.cpu_cores()) // here))
    if device == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks instead of returning them to the system.

    A training step allocates the same tensors again and again; returning them costs a page fault
    per 4 KiB on the next step, 10 % of the time of a depth-4 step on a 2-core virtual machine.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc; training is merely slower
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)
