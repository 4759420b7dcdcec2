"""A run in miniature for tests of run, report and chat: the folders and records, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fledge.config import Recipe, load_recipe
from fledge.plan.hardware import Hardware, parse
from fledge.plan.planner import Plan, resolve
from fledge.run import Run
from fledge.runlog import MetricsLog

TWO_CORES: Hardware = parse("2xcpu")


def plan_of(recipe: Recipe) -> Plan:
    return resolve(recipe, TWO_CORES)


def open_run(out: Path, recipe: Recipe | None = None) -> Run:
    recipe = recipe or load_recipe("tiny")[1]
    return Run.open(out, "tiny", recipe, plan_of(recipe))


def do_stage(run: Run, stage: str, *, status: Any = "done") -> None:
    """Record a stage as the pipeline would."""
    parts = run.stage_parts(stage, data={"world": "village"})
    if run.stage_state(stage, parts) == "skip":
        return
    run.begin_stage(stage, parts)
    run.end_stage(stage, status, seconds=1.5, peak_memory_bytes=1_000_000)


def write_training(run: Run, stage: str, *, steps: int = 40) -> None:
    with MetricsLog(run.metrics_file(stage)) as metrics:
        for step in range(1, steps + 1):
            row: dict[str, Any] = {"step": step, "tokens": 2048, "seconds": 0.1}
            row |= {"lr_factor": 1 - step / steps}
            row |= {"reward": step / steps} if stage == "rl" else {"loss": 1 + 3 / step}
            if step % 10 == 0 and stage != "rl":
                row |= {"bpb": 2.0 - step / 100}
            metrics.append(row)


def write_exam(run: Run, stage: str, task: str, value: float, *, n: int = 200) -> None:
    run.evaluate_dir(stage).mkdir(parents=True, exist_ok=True)
    score = {"task": task, "value": value, "low": value - 0.05, "high": value + 0.05}
    score |= {"n": n, "chance": 0.05, "unit": "accuracy", "seconds": 1.0}
    run.task_file(stage, task).write_text(json.dumps(score))
    records = [
        {
            "id": f"{task}-{i}",
            "question": f"What is {i} plus 2 | really?",
            "answer": str(i + 2),
            "parts": [
                {"type": "python", "text": f"{i} + 2"},
                {"type": "output", "text": str(i + 2)},
                {"type": "text", "text": f"It is {i + 2}."},
            ],
            "output": f"It is {i + 2}.",
            "correct": i % 2 == 0,
        }
        for i in range(4)
    ]
    run.task_samples_file(stage, task).write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )


def write_checkpoint(run: Run, stage: str, step: int) -> Path:
    folder = run.checkpoint_dir(stage, step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    run.set_latest(stage, step)
    return folder


def finished_run(out: Path) -> Run:
    """A run whose every stage is done, closed."""
    run = open_run(out)
    do_stage(run, "tokenizer")
    run.tokenizer_stats_file.write_text(
        json.dumps({"vocab_size": 1024, "train_bytes": 400000, "bytes_per_token": 3.0})
    )
    for stage in ("base", "mid", "sft", "rl"):
        do_stage(run, stage)
        write_training(run, stage)
        write_checkpoint(run, stage, 40)
    run.entropy_file.write_text(json.dumps({"bits_per_byte": 1.4}))
    run.samples_file("base").write_text("# What base writes\n\n**The**\n\n> The cat sat.\n")
    do_stage(run, "evaluate")
    for stage, value in (("mid", 0.4), ("sft", 0.6), ("rl", 0.8)):
        for task in ("world_facts", "world_math"):
            write_exam(run, stage, task, value)
    run.close()
    return run
