"""What the page shows of a model: its shape, its scores, and questions that it can answer.

`card_of` reads the configuration and, where the model comes from a run, report.json and the exam
transcripts. The suggestions are questions of the run's own exams that the model answered correctly
and surely; none before there are exams. Only files that `fledge.run` names are read, and only where
they lie inside the run. Called by `serve.models` when a server starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fledge.run import Run

SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
EXAMS = ("world_facts", "world_math", "world_spell", "gsm8k", "spelling")  # with written answers
SUGGESTIONS = 3
LONGEST = 140  # characters of a suggestion: it is the label of a button
ROWS = 400  # transcripts of an exam that are looked at


def card_of(config: dict[str, Any], run: Run | None, stage: str | None) -> dict[str, Any]:
    """The card; a run without a report, or a broken one, only makes it shorter."""
    card: dict[str, Any] = {"stage": stage, **{key: config.get(key) for key in SHAPE}}
    if run is None:
        return card
    card["run"] = run.name
    card["world"] = None if run.values["data.source"] else run.values["data.world"]
    report = _object(inside(run, run.report_file("json")))
    if isinstance(report.get("model"), dict):
        card["model"] = report["model"]
        stages = report.get("stages")
        if isinstance(stages, dict):
            card["scores"] = {
                name: facts["scores"]
                for name, facts in stages.items()
                if isinstance(facts, dict) and isinstance(facts.get("scores"), dict)
            }
    card["suggestions"] = suggestions(run, stage) if stage not in (None, "base") else []
    return card


def suggestions(run: Run, stage: str | None) -> list[dict[str, str]]:
    """At most three {question, exam}: of what it got right in an exam, what it was surest of."""
    found = []
    for exam in EXAMS:
        best = _surest(inside(run, run.task_samples_file(stage, exam))) if stage else None
        if best is not None:
            found.append({"question": best, "exam": exam})
    return found[:SUGGESTIONS]


def inside(run: Run, path: Path) -> Path | None:
    """`path` if it is a file that really lies in the run, links followed; else None."""
    try:
        real = path.resolve(strict=True)
        return real if real.is_file() and real.is_relative_to(run.path.resolve()) else None
    except OSError:
        return None


def _object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a report that is being written; the card does without
    return value if isinstance(value, dict) else {}


def _surest(path: Path | None) -> str | None:
    best: tuple[float, str] | None = None
    for row in _rows(path):
        question, logprobs = row.get("question"), row.get("logprobs") or []
        if not isinstance(logprobs, list):
            continue
        if row.get("correct") is not True or not isinstance(question, str):
            continue
        if not 0 < len(question) <= LONGEST or "\n" in question:
            continue
        if not all(isinstance(value, (int, float)) for value in logprobs):
            continue
        sure = min(logprobs, default=-1.0)
        if best is None or sure > best[0]:
            best = (sure, question)
    return None if best is None else best[1]


def _rows(path: Path | None) -> Iterator[dict[str, Any]]:
    if path is None:
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for _, line in zip(range(ROWS), lines, strict=False):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
