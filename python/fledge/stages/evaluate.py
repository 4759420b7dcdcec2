"""The exams: every task on the last checkpoint of every stage, with intervals and records.

`run` is the run's last stage; `evaluate_model` examines one checkpoint for `fledge eval`. A task
whose result file exists is not repeated, so an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from fledge import files
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals.scoring import TaskResult, pick_items, score_task
from fledge.evals.tasks.base import Task
from fledge.evals.tasks.registry import find_tasks
from fledge.model import Transformer
from fledge.report import gather
from fledge.run import Run, find_checkpoint
from fledge.stages.context import StageContext, peak_memory_bytes
from fledge.stages.inference import stage_engine
from fledge.stages.material import open_material
from fledge.tokenizer import Tokenizer
from fledge.train.checkpoint import verify


def run(ctx: StageContext, *, resume: bool) -> None:
    """Examines the stages that the recipe names; a finished task is skipped on resume."""
    section = ctx.recipe.evaluate
    tasks = ctx.material.tasks(section.tasks)
    found = {stage: ctx.run.latest_checkpoint(stage) for stage in section.stages}
    folders = {stage: folder for stage, folder in found.items() if folder is not None}
    sizes = {task.name: len(pick_items(task.items(), section.max_examples)) for task in tasks}
    total, log = sum(sizes.values()) * len(folders), ctx.run.log_file("evaluate")
    ctx.progress.stage("evaluate", total, "questions", log=log)
    done = 0
    for stage, folder in folders.items():
        engine: Engine | None = None
        for task in tasks:
            if not ctx.run.task_file(stage, task.name).is_file():
                if engine is None:
                    verify(folder)
                    engine = _open_engine(folder)
                    engine.model.to(ctx.device)
                with Tools() as tools:
                    result = score_task(engine, task, tools, max_examples=section.max_examples)
                write_result(ctx.run, stage, result)
                ctx.progress.note(f"{stage}: {describe(result)}")
            done += sizes[task.name]
            ctx.progress.update(done)
            ctx.stop.raise_if_requested("evaluate")
        write_chatcore(ctx.run, stage, [task.name for task in tasks])


def _open_engine(folder: Path) -> Engine:
    return stage_engine(Transformer.load(folder).eval(), Tokenizer.load(folder))


def write_result(run: Run, stage: str, result: TaskResult) -> None:
    """One JSON and one file of records; the JSON comes last and marks the task as done."""
    records = "".join(
        json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in result.records
    )
    files.write_text(run.task_samples_file(stage, result.name), records)
    files.write_json(run.task_file(stage, result.name), {"task": result.name, **result.summary()})


def write_chatcore(run: Run, stage: str, names: list[str]) -> None:
    """ChatCORE: the mean over the tasks of (accuracy - chance) / (1 - chance), list included."""
    centred = {}
    for name in names:
        table = json.loads(run.task_file(stage, name).read_text(encoding="utf-8"))
        centred[name] = (table["value"] - table["chance"]) / (1 - table["chance"])
    if centred:
        value = sum(centred.values()) / len(centred)
        files.write_json(
            run.task_file(stage, "chatcore"),
            {"task": "chatcore", "value": value, "tasks": centred, "unit": "centred accuracy"},
        )


def describe(result: TaskResult) -> str:
    """One line: name, score, interval, n, chance."""
    return (
        f"{result.name} {result.value:.1%} [{result.low:.1%}, {result.high:.1%}] "
        f"n={result.n}, chance {result.chance:.0%}, {result.seconds:.0f} s"
    )


def evaluate_model(
    path: str | Path,
    tasks: tuple[str, ...] | None,
    max_examples: int | None,
    data_root: str | None,
) -> dict[str, Any]:
    """Examines a run's last stage or one checkpoint folder; the shape of report.json.

    The material of the run that the checkpoint lies in gives the tasks; one that lies in no run is
    examined on the real tasks found under `data_root` or FLEDGE_DATA.
    """
    folder, run, stage = find_checkpoint(Path(path))
    found, notes = _tasks_for(run, tasks, data_root)
    if not found:
        raise UserError(
            f"there is nothing to examine {path} on",
            "; ".join(notes) or "its data offers no task",
            "put task files under FLEDGE_DATA, or name their folder with --data-root",
        )
    engine = _open_engine(folder)
    scores = {}
    began = time.monotonic()
    for task in found:
        with Tools() as tools:
            result = score_task(engine, task, tools, max_examples=max_examples)
        scores[result.name] = result.summary()
    table = {
        "seconds": round(time.monotonic() - began, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "scores": scores,
    }
    model = {
        "depth": engine.model.config.num_hidden_layers,
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "training_tokens": gather(run)["model"]["training_tokens"] if run is not None else None,
    }
    return {"model": model, "stages": {stage or "model": table}}


def _tasks_for(
    run: Run | None, names: tuple[str, ...] | None, data_root: str | None
) -> tuple[list[Task], list[str]]:
    """(tasks, notes on what is missing); UserError for a name that is no task."""
    if run is None:
        return find_tasks(data_root, names)
    recipe = run.recipe
    data = dataclasses.replace(recipe.data, root=data_root or recipe.data.root)
    asked = dataclasses.replace(recipe.evaluate, tasks=names)
    material = open_material(dataclasses.replace(recipe, data=data, evaluate=asked))
    return material.tasks(names), material.notes
