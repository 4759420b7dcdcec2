"""The exams: every task on the last checkpoint of every stage, with intervals and records.

`run` is the run's last stage; `evaluate_model` examines one checkpoint for `fledge eval`. A task
that was taken on the same model and questions is read back, and one that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge import files
from fledge.data.overlap import read_texts
from fledge.dist import World
from fledge.errors import Interrupted, UserError
from fledge.evals import bpb, hf, suite
from fledge.evals.examine import TaskResult, pick_items
from fledge.evals.records import Store, model_hash
from fledge.evals.suite import Options
from fledge.evals.tasks.base import Task
from fledge.evals.tasks.core import CORE
from fledge.evals.tasks.registry import find_tasks
from fledge.evals.tasks.worlds import EXAMS
from fledge.model import Transformer
from fledge.model.precision import without_gradients
from fledge.report import gather
from fledge.run import Run, find_checkpoint
from fledge.stages import chat_exam
from fledge.stages.context import StageContext, peak_memory_bytes
from fledge.stages.inference import stage_engine
from fledge.stages.material import open_material
from fledge.stats import format_percent
from fledge.tokenizer import Tokenizer
from fledge.train.checkpoint import verify

Note = Callable[[str], None]


class Candidate:
    """One checkpoint and the store of its results; opened when the first exam needs it."""

    def __init__(
        self,
        folder: Path,
        store: Store | None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        is_foreign: bool = False,
        world: World | None = None,
    ) -> None:
        """dtype: what it computes in. is_foreign: another maker's model, which has CORE only.
        world: the ranks that share its exams."""
        self.folder = folder
        self.store = store
        self.device = device
        self.dtype = dtype
        self.is_foreign = is_foreign
        self.world = world or World()

    @functools.cached_property
    def engine(self) -> Any:
        """The engine of the checkpoint."""
        if (self.folder / "train_state").is_dir():
            verify(self.folder)
        if self.is_foreign:
            engine = hf.open_hf(self.folder)
            engine.model.eval().to(self.device or "cpu")
            return engine
        model = Transformer.load(self.folder, device=self.device).eval()
        return stage_engine(model.compute_in(self.dtype), Tokenizer.load(self.folder))

    def take(
        self, task: Task, options: Options, *, after_chunk: Callable[[int], None] | None = None
    ) -> TaskResult:
        """One exam, or its result from the store, which the leader alone reads and writes."""
        if self.store is not None:
            kept = suite.kept(task, options, self.store) if self.world.leads else None
            kept = self.world.tell(kept)
            if kept is not None:
                return kept
        return suite.take(
            self.engine,
            task,
            options,
            store=self.store,
            world=self.world,
            after_chunk=after_chunk,
        )


def run(ctx: StageContext, *, resume: bool) -> None:
    """Examines the stages that the recipe names; a finished task is skipped on resume.

    The ranks of the world share every task's examples; the leader writes what comes of it.
    """
    section = ctx.recipe.evaluate
    options = Options(max_examples=section.max_examples)
    tasks = ctx.material.tasks(section.tasks)
    found = {stage: ctx.run.latest_checkpoint(stage) for stage in section.stages}
    folders = {stage: folder for stage, folder in found.items() if folder is not None}
    sizes = {task.name: len(pick_items(task.items(), section.max_examples)) for task in tasks}
    total, log = sum(sizes.values()) * len(folders), ctx.run.log_file("evaluate")
    ctx.progress.stage("evaluate", total, "questions", log=log)
    done = 0

    def stop_if_asked() -> None:
        # agreed by all ranks: a signal reaches them at different moments
        if any(ctx.world.all_of(ctx.stop.requested)):
            raise Interrupted("evaluate")

    def after_chunk(answered: int) -> None:
        ctx.progress.update(done + answered)
        stop_if_asked()

    for stage, folder in folders.items():
        dtype = without_gradients(ctx.recipe.hardware.dtype or "float32")
        key = model_hash(folder, dtype)
        store = Store(ctx.run.evaluate_dir(stage), key)
        candidate = Candidate(folder, store, device=ctx.device, dtype=dtype, world=ctx.world)
        results = []
        for task in tasks:
            results.append(candidate.take(task, options, after_chunk=after_chunk))
            ctx.progress.note(f"{stage}: {describe(results[-1])}")
            done += sizes[task.name]
            ctx.progress.update(done)
            stop_if_asked()
        if ctx.world.leads:
            write_composites(ctx.run.evaluate_dir(stage), results, options)
        if section.dialogues:
            asked: dict[str, Any] = {"count": section.dialogues, "key": key}
            found = chat_exam.kept(ctx.run, stage, **asked) if ctx.world.leads else None
            found = ctx.world.tell(found)
            if found is None:
                found = chat_exam.take(
                    candidate.engine, ctx.material, ctx.run, stage, **asked, world=ctx.world
                )
            ctx.progress.note(f"{stage}: {chat_exam.describe(found)}")


def write_composites(folder: Path, results: Sequence[TaskResult], options: Options) -> None:
    """chatcore.json and core.json, where their tasks were taken."""
    scores = {result.name: result.summary() for result in results}
    table = suite.chatcore(scores)
    if table is not None:
        files.write_json(folder / "chatcore.json", table)
    core = suite.core_table(results, profile=options.profile)
    if core is not None:
        files.write_json(folder / f"{CORE}.json", core)


def describe(result: TaskResult) -> str:
    """One line: name, score, interval, n, chance."""
    return (
        f"{result.name} {result.value:.1%} [{result.low:.1%}, {result.high:.1%}] "
        f"n={result.n}, chance {format_percent(result.chance)}, {result.seconds:.0f} s"
    )


# -- one checkpoint, for `fledge eval` -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Examined:
    """One model's results; `table` has the shape of report.json."""

    results: list[TaskResult]
    table: dict[str, Any]
    folder: Path | None  # where its results are kept


def evaluate_model(
    path: str | Path,
    tasks: tuple[str, ...] | None,
    options: Options,
    data_root: str | None,
    *,
    out: Path | None = None,
    keep: bool = True,
    note: Note | None = None,
) -> Examined:
    """Examines a run's last stage or one checkpoint folder.

    The material of the run that the checkpoint lies in gives the tasks; one that lies in no run is
    examined on the real tasks found under `data_root` or FLEDGE_DATA. Results are kept in `out`, by
    default beside the checkpoint (in a run: STAGE/evals/step_N), unless `keep` is False.
    """
    folder, in_run, stage = find_checkpoint(Path(path))
    found, notes = _tasks_for(in_run, tasks, data_root)
    is_foreign = in_run is None and hf.is_foreign(folder)
    if is_foreign:
        notes += [
            f"{t.name} is left out: {path} has no chat format" for t in found if t.kind != CORE
        ]
        found = [task for task in found if task.kind == CORE]
    if not found:
        raise UserError(
            f"there is nothing to examine {path} on",
            "; ".join(notes) or "its data offers no task",
            "put task files under FLEDGE_DATA, or name their folder with --data-root",
        )
    place = (out or _place(folder, in_run, stage)) if keep else None
    store = Store(place, model_hash(folder)) if place is not None else None
    candidate = Candidate(folder, store, is_foreign=is_foreign)
    began, results = time.monotonic(), []
    for task in found:
        results.append(candidate.take(task, options))
        if note is not None:
            note(describe(results[-1]))
    if place is not None:
        write_composites(place, results, options)
    table = {
        "seconds": round(time.monotonic() - began, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "scores": scores_of(results, options),
    }
    described = describe_model(candidate, in_run)
    whole = {"model": described, "stages": {stage or "model": table}, "notes": notes}
    return Examined(results, whole, place)


def describe_model(candidate: Candidate, run: Run | None) -> dict[str, Any]:
    """The "model" of report.json."""
    model = candidate.engine.model
    return {
        "depth": model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": gather(run)["model"]["training_tokens"] if run is not None else None,
    }


def scores_of(results: Sequence[TaskResult], options: Options) -> dict[str, Any]:
    """The composites first (CORE in both versions), then every task."""
    each = {result.name: result.summary() for result in results}
    core = suite.core_table(results, profile=options.profile)
    chat = suite.chatcore(each)
    composites: dict[str, Any] = dict(core["scores"]) if core is not None else {}
    if chat is not None and len(chat["tasks"]) > 1:
        composites["chatcore"] = {k: v for k, v in chat.items() if k != "task"}
    return composites | each


def _place(folder: Path, run: Run | None, stage: str | None) -> Path:
    if run is not None and stage is not None:
        return run.step_evals_dir(stage, folder.name)
    return folder / "evals"


def _tasks_for(
    run: Run | None, names: tuple[str, ...] | None, data_root: str | None
) -> tuple[list[Task], list[str]]:
    """(tasks, notes on what is missing); UserError for a name that is no task."""
    if run is None:
        return find_tasks(data_root, names)
    recipe = run.recipe
    data = dataclasses.replace(recipe.data, root=data_root or recipe.data.root)
    if recipe.data.source is not None:  # its tasks are files: the text need not be opened
        return find_tasks(data.root, names)
    of_world = None if names is None else tuple(n for n in names if n in EXAMS)
    if names is not None and len(of_world or ()) < len(names):
        # a world's model may be asked real questions too
        others = tuple(name for name in names if name not in EXAMS)
        if any(_looks_like_exam(name) for name in others):
            of_world, others = names, ()  # a misspelt exam: let the world say so
        real, notes = find_tasks(data.root, others) if others else ([], [])
        if not of_world:
            return real, notes
        own, more = _tasks_of_material(recipe, data, of_world)
        return own + real, notes + more
    return _tasks_of_material(recipe, data, names)


def _looks_like_exam(name: str) -> bool:
    import difflib

    return bool(difflib.get_close_matches(name, EXAMS, n=1, cutoff=0.7))


def _tasks_of_material(
    recipe: Any, data: Any, names: tuple[str, ...] | None
) -> tuple[list[Task], list[str]]:
    asked = dataclasses.replace(recipe.evaluate, tasks=names)
    material = open_material(dataclasses.replace(recipe, data=data, evaluate=asked))
    return material.tasks(names), material.notes


def bits_per_byte(path: str | Path, text: Path) -> dict[str, Any]:
    """Bits per byte of a file or folder of text, whole documents; the shape of report.json."""
    folder, in_run, stage = find_checkpoint(Path(path))
    if in_run is None and hf.is_foreign(folder):
        raise UserError(
            f"{path} was not written by fledge",
            "the bytes of its tokens are not known here",
            "measure it with lm-eval",
        )
    candidate = Candidate(folder, None)
    began = time.monotonic()
    losses = bpb.full_documents(candidate.engine, read_texts(text))
    if not losses.bytes:
        raise UserError(f"{text} holds no text", "every document is empty", "name another file")
    limit = candidate.engine.model.config.max_position_embeddings
    score = {
        "value": losses.bpb,
        "low": None,
        "high": None,
        "n": losses.bytes,
        "chance": None,
        "unit": "bits per byte",
        "tokens": losses.tokens,
        "note": f"{losses.bytes:,} bytes of whole documents behind <|bos|>; windows of {limit} "
        f"tokens slide by {limit - limit // 2}",
    }
    table = {
        "seconds": round(time.monotonic() - began, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "scores": {"bpb_full": score},
    }
    described = describe_model(candidate, in_run)
    return {"model": described, "stages": {stage or "model": table}, "notes": []}


def chances(results: Sequence[TaskResult]) -> Mapping[str, float]:
    """Chance by task name."""
    return {result.name: result.chance for result in results}
