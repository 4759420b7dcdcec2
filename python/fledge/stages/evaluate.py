"""The exams: every task on the last checkpoint of every stage, with intervals and records.

`run` is the run's last stage; `evaluate_model` examines one checkpoint for `fledge eval`. A task
whose result file exists is not repeated, so an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fledge import files
from fledge.config import DataSection, Recipe
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals.scoring import TaskResult, pick_items, score_task
from fledge.evals.tasks.base import Task
from fledge.run import Run
from fledge.stages.context import StageContext
from fledge.stages.material import Material, open_material
from fledge.train.checkpoint import verify


def run(ctx: StageContext, *, resume: bool) -> None:
    """Examines the stages that the recipe names; a finished task is skipped on resume."""
    section = ctx.recipe.evaluate
    tasks = ctx.material.tasks(section.tasks)
    stages = [s for s in section.stages if ctx.run.latest_checkpoint(s) is not None]
    sizes = {task.name: len(pick_items(task.items(), section.max_examples)) for task in tasks}
    ctx.progress.stage(
        "evaluate",
        sum(sizes.values()) * len(stages),
        "questions",
        log=ctx.run.log_file("evaluate"),
    )
    done = 0
    for stage in stages:
        engine: Engine | None = None
        for task in tasks:
            path = ctx.run.task_file(stage, task.name)
            if not path.is_file():
                if engine is None:
                    checkpoint = ctx.run.latest_checkpoint(stage)
                    assert checkpoint is not None
                    verify(checkpoint)
                    engine = Engine.from_folder(checkpoint)
                    engine.model.to(ctx.device).eval()
                with Tools() as tools:
                    result = score_task(engine, task, tools, max_examples=section.max_examples)
                write_result(ctx.run, stage, result)
                ctx.progress.note(f"{stage}: {describe(result)}")
            done += sizes[task.name]
            ctx.progress.update(done)
            ctx.stop.raise_if_requested("evaluate")
        write_chatcore(ctx.run, stage, [task.name for task in tasks])


def write_result(run: Run, stage: str, result: TaskResult) -> None:
    """One JSON and one file of records; the JSON comes last and marks the task as done."""
    records = "".join(
        json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in result.records
    )
    samples = run.task_samples_file(stage, result.name)
    samples.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(samples, records)
    files.write_json(
        run.task_file(stage, result.name),
        {"task": result.name, **result.summary(), "seconds": round(result.seconds, 3)},
    )


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
    """Examines a run's last stage or one checkpoint folder; the shape of report.json's scores.

    A run's own material gives the tasks; a bare checkpoint is examined on the real tasks found
    under `data_root` or FLEDGE_DATA.
    """
    path = Path(path)
    stage, checkpoint = "model", path
    recipe = Recipe(data=DataSection(root=data_root))
    material: Material
    if Run.is_run(path):
        run = Run.read(path)
        last = run.last_model()
        if last is None:
            raise UserError(
                f"{path} has no trained model yet", "no stage has a checkpoint", "run it first"
            )
        stage, checkpoint = last
        recipe = run.recipe
    material = open_material(recipe)
    found: list[Task] = material.tasks(tasks)
    if not found:
        raise UserError(
            f"none of the tasks {', '.join(tasks or ())} can be examined",
            "; ".join(material.notes) or "the data offers no such task",
            "name tasks that exist (`fledge data list`), or give --data-root",
        )
    engine = Engine.from_folder(checkpoint)
    engine.model.eval()
    scores = {}
    for task in found:
        with Tools() as tools:
            result = score_task(engine, task, tools, max_examples=max_examples)
        scores[result.name] = result.summary() | {"seconds": round(result.seconds, 3)}
    parameters = sum(p.numel() for p in engine.model.parameters())
    model = {"depth": engine.model.config.num_hidden_layers, "parameters": parameters}
    return {"model": model, "stages": {stage: {"scores": scores}}}
