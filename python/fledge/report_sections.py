"""Further sections of the report: plan against actual, CORE, overlap, chat, recipe, hashes.

Each function gives the blocks of one section, or none where a run has nothing to tell of it. Called
by `fledge.report_blocks`. Every figure is read from a file of the run; nothing is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fledge import files
from fledge.config import STAGES, TRAINED_STAGES, Recipe, recipe_to_dict
from fledge.progress import format_seconds
from fledge.report_pages import Block, Heading, Listing, Paragraph, Table
from fledge.report_trouble import DAMAGED
from fledge.run import Run
from fledge.stats import format_interval


def plan_blocks(run: Run, facts: Mapping[str, Any]) -> list[Block]:
    """Planned and actual time of every stage, and the price where the machine has one."""
    planned = run.resolved["estimates"]["stages"]
    price = run.resolved["hardware"].get("dollars_per_hour")
    rows = []
    for stage in STAGES:
        actual = facts["stages"].get(stage, {}).get("seconds")
        guess = planned.get(stage, {}).get("seconds")
        if actual is None and guess is None:
            continue
        row = [
            stage,
            format_seconds(guess) if guess is not None else "-",
            format_seconds(actual) if actual is not None else "not begun",
            f"{actual / guess:.2f}" if actual is not None and guess else "-",
        ]
        if price:
            row.append(f"{actual / 3600 * price:.2f}" if actual is not None else "-")
        rows.append(row)
    rows.append(_total_row(run, facts, price))
    header = ["stage", "planned", "actual", "actual / planned"]
    blocks: list[Block] = [
        Heading("Planned and actual"),
        Table([*header, *(["dollars"] if price else [])], rows),
    ]
    told = run.resolved["estimates"].get("basis")
    if told:
        blocks.append(Paragraph(f"The plan: {told}."))
    if not price:
        blocks.append(Paragraph("This machine has no price per hour, so no cost is given."))
    return blocks


def _total_row(run: Run, facts: Mapping[str, Any], price: float | None) -> list[str]:
    """The whole run; against the plan of the stages that are done, for the rest has no time yet."""
    planned, stages = run.resolved["estimates"]["stages"], facts["stages"]
    whole = sum(stage["seconds"] for stage in planned.values())
    actual = sum(stage["seconds"] for stage in stages.values())
    done = [name for name, stage in stages.items() if stage["status"] == "done" and name in planned]
    of_these = sum(planned[name]["seconds"] for name in done)
    ratio = sum(stages[name]["seconds"] for name in done) / of_these if of_these else None
    row = ["together", format_seconds(whole), format_seconds(actual)]
    row.append(f"{ratio:.2f} (stages that are done)" if ratio is not None else "-")
    return [*row, f"{actual / 3600 * price:.2f}"] if price else row


def overlap_blocks(run: Run) -> list[Block]:
    """Exam questions that stand in the training text, where that was looked for."""
    title = Heading("Exam questions in the training text")
    if not run.overlap_file.is_file():
        if run.values["data.source"] is None:
            return []
        return [title, Paragraph("Not looked for: run `fledge data overlap` on this run.")]
    table = files.read_json(run.overlap_file, fix=DAMAGED)
    rows = [
        [
            name,
            f"{row['items']:,}",
            f"{row['overlapped']:,}",
            f"{100 * row['share']:.2f} %",  # a thousandth is of interest here
            f"{row['too_short']:,}",
            row["examples"][0]["words"] if row["examples"] else "-",
        ]
        for name, row in table["tasks"].items()
    ]
    return [
        title,
        Paragraph(
            f"Looked for in {table['documents']:,} documents ({table['bytes'] / 1e6:,.1f} MB): a "
            f"question counts when {table['words']} words in a row occur in one of them."
        ),
        Table(["task", "questions", "found", "share", "too short", "for example"], rows),
    ]


def core_tasks_table(stages: Mapping[str, Any]) -> Table | None:
    """CORE task by task, of every stage that took any: accuracy, standard error, both centrings."""
    rows = []
    with_stage = sum(
        any(n.startswith("core/") for n in t.get("scores", {})) for t in stages.values()
    )
    for stage, table in stages.items():
        for name, score in table.get("scores", {}).items():
            if not name.startswith("core/"):
                continue
            error = score.get("stderr")
            rows.append(
                [
                    *([stage] if with_stage > 1 else []),
                    name.removeprefix("core/"),
                    format_interval(score["value"], score["low"], score["high"]),
                    f"{100 * error:.1f}" if error is not None else "-",
                    f"{score['centred_v1']:+.3f}",
                    f"{score['centred_v2']:+.3f}",
                    str(score["shots"]),
                    f"{score['truncated']:,} of {score['n']:,}",
                ]
            )
    if not rows:
        return None
    header = ["task", "accuracy", "stderr (%)", "centred v1", "centred v2", "shots", "cut"]
    return Table([*(["stage"] if with_stage > 1 else []), *header], rows)


def core_blocks(facts: Mapping[str, Any]) -> list[Block]:
    """CORE by task with what its numbers mean."""
    table = core_tasks_table(facts["stages"])
    if table is None:
        return []
    return [
        Heading("CORE by task"),
        Paragraph(
            "Centred accuracy is 0 where guessing would be and 1 where everything is right; v1 and "
            "v2 differ in three baselines (commonsense_qa, agi_eval_lsat_ar, "
            "bigbench_language_identification), and only v1 compares with nanochat's tables. "
            "Cut: prompts longer than the context, which lost their beginning. The intervals hold "
            "the noise of the questions, not that of another training run (CORE: about 0.006)."
        ),
        table,
    ]


CHAT_MEASURES = {
    "stops": "replies that end by themselves",
    "repeats": "four-word runs said before in the same reply",
    "stops_likeliest": "replies that end by themselves, nothing held back",
    "repeats_likeliest": "four-word runs said before, nothing held back",
    "recalls": "probes that use what was told a turn before",
    "flips": "right answers given up when the user asserts a wrong one",
    "calls": "problems answered with a tool call in good form",
    "persona": "probes answered in character",
    "bpb": "bits per byte of the assistant's part",
}
TRANSCRIPTS = 20


def chat_blocks(run: Run, facts: Mapping[str, Any]) -> list[Block]:
    """Is the chat any good: the measures of every stage, and the first dialogues as they came."""
    measured = {s: t["chat"] for s, t in facts["stages"].items() if t.get("chat")}
    if not measured:
        return []
    rows = [
        [words, *(_chat_cell(scores.get(name)) for scores in measured.values())]
        for name, words in CHAT_MEASURES.items()
        if any(name in scores for scores in measured.values())
    ]
    count = max(score["n"] for scores in measured.values() for score in scores.values())
    blocks: list[Block] = [
        Heading("Is the chat any good?"),
        Paragraph(
            "Replies as `fledge chat` gives them by itself (the likeliest token, going round in "
            "circles held back) in dialogues that no stage was trained on, at most three turns "
            f"each, and probes; up to {count} of a kind, with 95 % intervals. All of it is "
            "counted, not judged. A dash: nothing could be asked (no fact was known that one might "
            "give up). Bits per byte have no interval: they are one mean over all bytes, and bytes "
            "of one dialogue depend on each other."
        ),
        Table(["share of", *measured], rows),
    ]
    for stage in measured:
        path = run.chat_samples_file(stage)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()[:TRANSCRIPTS]
            blocks.append(Heading(f"{stage}: the first {len(lines)} dialogues, unpicked", 3))
            blocks.append(Listing("\n\n".join(_dialogue(json.loads(line)) for line in lines)))
    return blocks


def _chat_cell(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    if score["unit"] == "bits per byte":
        return f"{score['value']:.3f}"
    return f"{format_interval(score['value'], score['low'], score['high'])}, n = {score['n']}"


def _dialogue(talk: Mapping[str, Any]) -> str:
    return "\n".join(f"{m['role'] + ':':<11}{str(m['content']).strip()}" for m in talk["messages"])


def recipe_blocks(run: Run) -> list[Block]:
    """What a person asked for, without the keys that have their default."""
    asked, defaults = recipe_to_dict(run.asked), recipe_to_dict(Recipe())
    given = {
        name: {key: value for key, value in table.items() if value != defaults[name].get(key)}
        for name, table in asked.items()
    }
    rest = sum(map(len, asked.values())) - sum(map(len, given.values()))
    text = tomli_w.dumps({name: table for name, table in given.items() if table})
    return [
        Heading("What was asked for", 3),
        Paragraph(
            "The recipe with what the command line changed. "
            f"{rest} further keys have fledge's default and are left out here; the table below has "
            "every number that was used."
        ),
        Listing(text or "nothing: every key has its default"),
    ]


def hash_blocks(run: Run) -> list[Block]:
    """Fingerprints of the stages and hashes of their last weights."""
    rows = []
    for stage in STAGES:
        record = run.read_stage(stage)
        if record is None:
            continue
        folder = run.latest_checkpoint(stage) if stage in TRAINED_STAGES else None
        weights = folder / "model.safetensors" if folder is not None else None
        rows.append(
            [
                stage,
                record["fingerprint"][:16],
                folder.name if folder is not None else "-",
                _sha256(weights)[:16] if weights is not None and weights.is_file() else "-",
            ]
        )
    if not rows:
        return []
    return [
        Heading("Hashes", 3),
        Table(["stage", "fingerprint", "last checkpoint", "sha256 of its weights"], rows),
        Paragraph(
            "The fingerprint covers every setting that changes the result, the data and the stages "
            "before; the first 16 digits of each."
        ),
    ]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


NANOCHAT_ROWS = {
    "CORE": ("core_v1", "core_v1_partial"),
    "ARC-Challenge": ("arc_challenge",),
    "ARC-Easy": ("arc_easy",),
    "GSM8K": ("gsm8k",),
    "HumanEval": ("humaneval",),
    "MMLU": ("mmlu",),
    "ChatCORE": ("chatcore",),
}
"""Rows of the summary table of nanochat's report (October 2025), by our names of the scores."""


def nanochat_blocks(stages: Mapping[str, Any]) -> list[Block]:
    """The real exams in the form in which nanochat publishes them, with intervals.

    Nothing where none of them was taken.
    """
    columns = [name for name in TRAINED_STAGES if stages.get(name, {}).get("scores")]
    rows = []
    for title, names in NANOCHAT_ROWS.items():
        cells = []
        for stage in columns:
            scores = stages[stage]["scores"]
            score = next((scores[name] for name in names if name in scores), None)
            cells.append(_in_brackets(score) if score else "-")
        rows.append([title, *cells])
    if all(cell == "-" for row in rows for cell in row[1:]):
        return []
    return [
        Heading("In the form of nanochat's report", 3),
        Table(["metric", *(name.upper() for name in columns)], rows),
        Paragraph(
            "Shares of 1, with 95 % intervals in brackets; a score without them comes from a "
            "version that did not compute them. CORE is centred by its first baselines."
        ),
    ]


def _in_brackets(score: Mapping[str, Any]) -> str:
    text = f"{score['value']:.4f}"
    if score.get("low") is None:
        return text
    return f"{text} [{score['low']:.4f}, {score['high']:.4f}]"


def rehearsal_blocks(run: Run) -> list[Block]:
    """Of a rehearsal: by how much it is smaller than what it rehearses."""
    rehearsal = run.resolved.get("rehearsal")
    if rehearsal is None:
        return []
    rows = [[key, text] for key, text in rehearsal["factors"].items()]
    return [
        Heading("A rehearsal"),
        Paragraph(
            f"This is {rehearsal['of']} in miniature: the same recipe and the same code, smaller "
            "by these factors. It shows that every part works; its scores say nothing."
        ),
        Table(["key", "in the recipe -> here"], rows),
    ]
