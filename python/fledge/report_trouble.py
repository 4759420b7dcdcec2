"""What went wrong in a run: failures, interruptions, skipped steps, roll-backs, missing exams.

`troubles` finds them in stage.json, metrics.jsonl and the scores; `wrong_blocks` is the report's
section of them. Called by `fledge.report_brief` and `fledge.report_blocks`. It writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fledge.config import TRAINED_STAGES
from fledge.progress import format_seconds
from fledge.report_pages import Block, Heading, Listing, Paragraph
from fledge.run import Run
from fledge.runlog import read_metrics

DAMAGED = "delete it and run the same command again"
LOG_LINES = 12  # of the log of a stage that failed
SHOWN_STEPS = 8


@dataclass(frozen=True)
class Trouble:
    """One thing that went wrong; `log` is the end of the log of a stage that did not end well."""

    text: str
    log: str = ""


def troubles(run: Run, facts: Mapping[str, Any]) -> list[Trouble]:
    """All that went wrong, stage by stage, then the exams that are missing."""
    found: list[Trouble] = []
    for stage, table in facts["stages"].items():
        found += _of_status(run, stage, table)
        found += _of_steps(stage, read_metrics(run.metrics_file(stage)))
    return found + [Trouble(text) for text in missing_exams(run, facts)]


def _of_status(run: Run, stage: str, table: Mapping[str, Any]) -> list[Trouble]:
    """How a stage ended, unless it did so well and at once."""
    record, attempts = run.read_stage(stage) or {}, table["attempts"]
    if table["status"] == "done":
        text = f"{stage} was interrupted and taken up again: {attempts} attempts."
        return [Trouble(text)] if attempts > 1 else []
    took = format_seconds(table["seconds"])
    if table["status"] == "running":
        if run.is_worked_on():
            return [Trouble(f"{stage} is running just now; its time counts when it ends.")]
        text = f"{stage} stopped without a word (killed, or the power went)"
    elif table["status"] == "interrupted":
        text = f"{stage} was interrupted after {took}"
    else:
        text = f"{stage} failed after {took}"
    text += f" in attempt {attempts}" if attempts > 1 else ""
    error = " ".join((record.get("error") or "").split()).rstrip(".")
    text += f": {error}." if error else "."
    log = run.log_file(stage)
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    return [Trouble(text, "\n".join(lines[-LOG_LINES:]))]


def _of_steps(stage: str, rows: list[dict[str, Any]]) -> list[Trouble]:
    """Steps that were not learnt from, and returns to earlier weights."""
    found = []
    empty = sum(1 for row in rows if row.get("skipped") and not row.get("trained_tokens", 1))
    if empty:
        found.append(Trouble(f"{stage}: {empty} of {len(rows)} batches had nothing to learn."))
    skipped = [r["step"] for r in rows if r.get("skipped") and r.get("trained_tokens", 1)]
    if skipped:
        shown = ", ".join(map(str, skipped[:SHOWN_STEPS]))
        shown += ", ..." if len(skipped) > SHOWN_STEPS else ""
        what = "batch was" if len(skipped) == 1 else "batches were"
        found.append(
            Trouble(
                f"{stage}: {len(skipped)} of {len(rows)} {what} skipped, the loss not finite or a "
                f"spike (step {shown})."
            )
        )
    back = [(r["step"], r["rolled_back_to"]) for r in rows if r.get("rolled_back_to") is not None]
    if back:
        each = ", ".join(f"at step {step} to {earlier}" for step, earlier in back)
        found.append(Trouble(f"{stage} went back to earlier weights: {each}."))
    return found


def missing_exams(run: Run, facts: Mapping[str, Any]) -> list[str]:
    """Exams that a finished evaluation did not take: asked for, or part of a mean."""
    stages = facts["stages"]
    if stages.get("evaluate", {}).get("status") != "done":
        return []
    told: dict[str, None] = {}
    for stage in run.values["evaluate.stages"] or ():
        scores = stages.get(stage, {}).get("scores", {})
        if stage not in TRAINED_STAGES or (stage == "rl" and stage not in stages):
            continue
        taken = {name.partition("/")[0] for name in scores} | set(scores)
        asked = run.values["evaluate.tasks"] or ()
        lacking = [task for task in asked if task not in taken]
        if lacking:
            told[f"Not examined, though asked for: {', '.join(lacking)}."] = None
        for score in scores.values():
            note = score.get("note") or ""
            if "missing: " in note:
                told["Missing from a mean: " + note.partition("missing: ")[2] + "."] = None
    return list(told)


def wrong_blocks(run: Run, facts: Mapping[str, Any]) -> list[Block]:
    """The section on what went wrong, with the end of the log of a stage that did not end well."""
    blocks: list[Block] = [Heading("What went wrong")]
    for trouble in troubles(run, facts):
        blocks.append(Paragraph(trouble.text))
        if trouble.log:
            blocks.append(Listing(trouble.log))
    if len(blocks) == 1:
        blocks.append(Paragraph("Nothing: every stage went through at once."))
    return blocks
