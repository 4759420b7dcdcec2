"""How far a run is: stages, curves, samples and time left, for the page's training panel.

Reads what the run directory holds, while another process trains in it: stage.json, metrics.jsonl,
samples.md, through the paths of `fledge.run` and only where they lie inside the run. Curves are
thinned to a few hundred points, and a file that has not changed is not read again. It never
writes, never takes the run's lock, and knows no path from a client: names are looked up
among the runs of the served models. Called by `serve.app` in a thread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fledge.config import STAGES
from fledge.run import Run
from fledge.runlog import read_metrics
from fledge.serve.cards import inside

POINTS = 240  # of a curve: about the panel's width in pixels
CURVES = ("loss", "validation_loss", "bpb", "reward", "validation_reward")
SAMPLE_BYTES = 16 << 10


def overview(run: Run) -> dict[str, Any]:
    """Every stage with its state and progress, and an estimate of the seconds left."""
    planned = run.resolved["estimates"]["stages"]
    stages = [_stage(run, name, planned.get(name, {})) for name in STAGES if name in planned]
    running = any(stage["status"] == "running" for stage in stages) and run.is_worked_on()
    left = _seconds_left(stages) if running else None
    return {"name": run.name, "running": running, "seconds_left": left, "stages": stages}


def detail(run: Run, stage: str) -> dict[str, Any]:
    """Curves and samples of one stage; empty ones before it has any."""
    rows = _rows_of(run, stage)
    curves = {name: points for name in CURVES if (points := _curve(rows, name))}
    samples = inside(run, run.samples_file(stage))
    text = ""
    if samples is not None:
        with samples.open("rb") as file:
            text = file.read(SAMPLE_BYTES).decode("utf-8", "replace")
    return {"stage": stage, "curves": curves, "samples": text}


def _rows_of(run: Run, stage: str) -> tuple[dict[str, Any], ...]:
    path = inside(run, run.metrics_file(stage))
    if path is None:
        return ()
    facts = path.stat()
    return _read(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _read(path: Path, size: int, changed: int) -> tuple[dict[str, Any], ...]:
    """The rows of a file as it was then: a panel asks every few seconds, mostly for the same."""
    return tuple(read_metrics(path))


def _stage(run: Run, name: str, plan: dict[str, Any]) -> dict[str, Any]:
    record = run.read_stage(name)
    rows = _rows_of(run, name)
    last = rows[-1] if rows else {}
    facts: dict[str, Any] = {
        "stage": name,
        "status": record["status"] if record else "waiting",
        "planned_seconds": plan.get("seconds"),
        "seconds": record["seconds"] if record else None,
        "step": last.get("step"),
        "eta": None,
        "tokens_per_second": last.get("tokens_per_second"),
    }
    if record and record["status"] == "running" and last:
        facts["seconds"] = sum(row.get("seconds") or 0.0 for row in rows)
        facts["eta"] = last.get("eta", _left_of(run, name, rows))
    return facts


def _left_of(run: Run, stage: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """Seconds left of a stage whose rows carry no estimate, from its steps so far."""
    steps = run.values.get(f"{stage}.steps")
    if not steps:
        return None
    recent = [row.get("seconds") or 0.0 for row in rows[-20:]]
    return max(0, steps - rows[-1]["step"]) * sum(recent) / len(recent)


def _seconds_left(stages: list[dict[str, Any]]) -> float | None:
    """What the running stage says, and the plan of those to come scaled by how the plan fared."""
    done = [s for s in stages if s["status"] == "done" and s["planned_seconds"]]
    planned = sum(s["planned_seconds"] for s in done)
    spent = sum(s["seconds"] for s in done)
    left = 0.0
    for stage in stages:
        plan = stage["planned_seconds"] or 0.0
        if stage["status"] == "running" and stage["eta"] is not None:
            left += stage["eta"]
            # the stage at work is the better judge of the pace, if the plan is for its size
            spent, planned = spent + stage["seconds"] + stage["eta"], planned + plan
        elif stage["status"] != "done":
            left += plan * (spent / planned if planned > 0 else 1.0)
    return round(left, 1)


def _curve(rows: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """[step, mean of the bucket] in at most POINTS buckets; the last point is the last row's."""
    points = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]
    size = max(1, math.ceil(len(points) / POINTS))
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [[b[-1][0], round(sum(v for _, v in b) / len(b), 5)] for b in buckets]
