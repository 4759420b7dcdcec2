"""The report as a page for people: what happened, how good the model is, and what it was made of.

`page` gives the blocks of report.md and report.html; `report_pages` writes them in either language.
Called by `fledge.report`, which gathers the facts. It decides nothing and writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge import files, report_plots
from fledge.config import STAGES, TRAINED_STAGES
from fledge.progress import format_count, format_seconds
from fledge.report_brief import brief_blocks, exams, glossary_blocks, last_examined
from fledge.report_pages import Block, Heading, Listing, Paragraph, Plot, Table
from fledge.report_sections import (
    chat_blocks,
    core_blocks,
    hash_blocks,
    nanochat_blocks,
    overlap_blocks,
    plan_blocks,
    recipe_blocks,
    rehearsal_blocks,
)
from fledge.report_trouble import DAMAGED, wrong_blocks
from fledge.run import Run
from fledge.stats import format_interval, format_percent

TASK_WORDS = {
    "world_facts": "questions about facts",
    "world_mc": "multiple choice",
    "world_math": "word problems",
    "world_spell": "spelling and counting letters",
    "world_chat": "conversations of several turns",
    "gsm8k": "grade-school math (GSM8K)",
    "mmlu": "exam questions of 57 subjects (MMLU)",
    "arc_easy": "easy science questions (ARC)",
    "arc_challenge": "hard science questions (ARC)",
    "humaneval": "Python problems (HumanEval)",
    "chat": "openings of a conversation in good form",
}

TRANSCRIPTS_OF_EARLIER_STAGES = 2


def page(run: Run, facts: dict[str, Any], plots: list[Plot], code: Paragraph) -> list[Block]:
    """The whole report; `code` tells of the program itself."""
    blocks: list[Block] = [
        Heading(f"{run.name}: report", 1),
        Paragraph(summary_text(run, facts)),
        Paragraph(_talk_text(run)),
        *brief_blocks(run, facts),
        *rehearsal_blocks(run),
        *_score_blocks(facts),
        *nanochat_blocks(facts["stages"]),
        *(plot for plot in plots if plot.place == "scores"),
        *core_blocks(facts),
        *(plot for plot in plots if plot.place == "core"),
        *chat_blocks(run, facts),
        *overlap_blocks(run),
    ]
    curves = [plot for plot in plots if plot.place == "curves"]
    if curves:
        blocks += [Heading("Curves"), *curves]
    blocks += [
        *_stage_blocks(run, facts),
        *plan_blocks(run, facts),
        *wrong_blocks(run, facts),
        *_sample_blocks(run, facts),
        *_made_of_blocks(run),
        *hash_blocks(run),
        Heading("The code behind it"),
        code,
        *_skipped_blocks(run, facts, plots),
        *glossary_blocks(),
    ]
    return blocks


def _talk_text(run: Run) -> str:
    """How to talk to the model, and to which stage's: the furthest that has a checkpoint."""
    found = run.last_model()
    if found is None:
        return "There is no model to talk to yet."
    return f"Talk to it (the model of {found[0]}): `fledge chat .` in the folder of this report."


def summary_text(run: Run, facts: dict[str, Any]) -> str:
    """One plain paragraph: what happened and how good the model is."""
    model, stages = facts["model"], facts["stages"]
    source = run.values["data.source"]
    data = f"the text in {source}" if source else f"the built-in world {run.values['data.world']}"
    seconds = sum(stage["seconds"] for stage in stages.values())
    hardware = run.resolved["hardware"]["name"]
    sentences = [
        f"This run raised a language model of {format_count(model['parameters'])} parameters "
        f"(depth {model['depth']}) from nothing on {data}. It read "
        f"{format_count(model['training_tokens'])} tokens in {format_seconds(seconds)} on "
        f"{hardware}."
    ]
    sentences += _bpb_sentence(stages)
    sentences += _exam_sentences(stages)
    failed = [name for name, stage in stages.items() if stage["status"] == "failed"]
    if failed:
        sentences.append(f"It failed in {_join(failed)}: see what went wrong.")
    unfinished = [name for name, stage in stages.items() if stage["status"] != "done"]
    left_out = {"rl"} if run.values["rl.steps"] == 0 else set()
    missing = [name for name in STAGES if name not in stages and name not in left_out]
    if unfinished or missing:
        sentences.append(
            f"It is not finished: {_join(unfinished + missing)} still to do. "
            "The same `fledge run` command goes on and skips what is done."
        )
    return " ".join(sentences)


def _bpb_sentence(stages: Mapping[str, Any]) -> list[str]:
    score = stages.get("base", {}).get("scores", {}).get("bpb")
    if score is None:
        return []
    text = (
        f"After pretraining it needs {score['value']:.3f} bits for each byte of text that it has "
        "never seen"
    )
    if "bound" in score:
        text += f"; the text's own unpredictability is about {score['bound']:.3f}"
        text += ", and no model can do better"
    return [text + "."]


def _exam_sentences(stages: Mapping[str, Any]) -> list[str]:
    last = last_examined({"stages": stages})
    if last is None:
        return []
    told = [
        f"{format_interval(s['value'], s['low'], s['high'])} of {TASK_WORDS.get(task, task)} "
        f"(guessing gives {format_percent(s['chance'])})"
        for task, s in exams(stages[last]).items()
    ]
    sentences = [
        f"At the end of {last} it answers right " + _join(told) + ". "
        "The numbers in brackets are 95 % intervals."
    ]
    before = exams(stages.get("sft", {}))
    if last == "rl" and before:
        after = exams(stages["rl"])
        moved = [
            f"{TASK_WORDS.get(t, t)} from {100 * before[t]['value']:.1f} % to "
            f"{100 * after[t]['value']:.1f} %"
            for t in after
            if t in before and (after[t]["low"] > before[t]["high"])
        ]
        if moved:
            sentences.append(f"Reinforcement raised {_join(moved)}.")
    return sentences


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _score_blocks(facts: dict[str, Any]) -> list[Block]:
    table = score_table(facts["stages"])
    if table is None:
        return []
    return [
        Heading("Scores"),
        Paragraph(
            "Share of right answers with its 95 % interval (Wilson) and the number of questions; "
            "chance is what guessing scores. chatcore and core_v1, core_v2 are means of centred "
            "scores, 0 for guessing and 1 for all right. bpb: bits per byte of unseen text, "
            "bpb_chats: of unseen answers; less is better. They have no interval: each is one mean "
            "over all bytes of a fixed validation set, the same for every checkpoint, and bytes of "
            "one text depend on each other."
        ),
        table,
    ]


def score_table(stages: Mapping[str, Any]) -> Table | None:
    """Tasks by stages; None if nothing was examined."""
    columns = [name for name in TRAINED_STAGES if stages.get(name, {}).get("scores")]
    columns += [name for name in stages if name not in STAGES]
    tasks: dict[str, None] = {}
    for name in columns:
        tasks |= dict.fromkeys(stages[name]["scores"])
    if not tasks:
        return None
    rows = []
    for task in tasks:
        if task.startswith("core/"):  # they have a table of their own
            continue
        scores = [stages[name]["scores"].get(task) for name in columns]
        known = [s["chance"] for s in scores if s and s.get("chance") is not None]
        numbers = {s["n"] for s in scores if s and s.get("n") and s.get("low") is not None}
        alike = len(numbers) == 1  # then it need not stand in every cell
        rows.append(
            [
                task,
                *(cell(score, with_number=not alike) for score in scores),
                format_percent(known[0]) if known else "-",
                f"{numbers.pop():,}" if alike else "-",
            ]
        )
    return Table(["task", *columns, "chance", "questions"], rows)


def cell(score: Mapping[str, Any] | None, *, with_number: bool = True) -> str:
    """A score in a table: the interval, and the number of questions if wanted."""
    if not score:
        return "-"
    if score.get("low") is None or not score.get("n"):
        text = f"{score['value']:.3f}"
        return text + (f" (bound {score['bound']:.3f})" if "bound" in score else "")
    percent = score.get("unit", "accuracy") == "accuracy"
    text = format_interval(score["value"], score["low"], score["high"], percent=percent)
    return f"{text}, n={score['n']}" if with_number else text


def _stage_blocks(run: Run, facts: dict[str, Any]) -> list[Block]:
    rows = []
    for name, stage in facts["stages"].items():
        loss, reward = stage.get("loss"), stage.get("reward")
        rows.append(
            [
                name,
                stage["status"],
                f"{stage['steps']:,}" if "steps" in stage else "-",
                format_count(stage["tokens"]) if "tokens" in stage else "-",
                f"{stage['tokens_per_second']:,.0f}" if "tokens_per_second" in stage else "-",
                format_seconds(stage["seconds"]),
                f"{stage['peak_memory_bytes'] / 1e9:.2f} GB",
                f"{loss:.3f}" if loss is not None else "-",
                f"{reward:.2f}" if reward is not None else "-",
            ]
        )
    header = ["stage", "status", "steps", "tokens", "tokens/s", "time", "peak memory", "loss"]
    blocks: list[Block] = [
        Heading("Stages"),
        Table([*header, "reward"], rows),
        Paragraph(
            "Loss in nats per trained token and reward are means over the last twentieth of the "
            "steps of this one run, and so have no interval. Peak memory is the process's so far; "
            "time includes every attempt."
        ),
    ]
    if run.tokenizer_stats_file.is_file():
        stats = files.read_json(run.tokenizer_stats_file, fix=DAMAGED)
        blocks.append(
            Paragraph(
                f"The tokenizer has {stats['vocab_size']:,} tokens, learnt from "
                f"{format_count(stats['train_bytes'])}B of text; a token covers "
                f"{stats['bytes_per_token']:.2f} bytes on average."
            )
        )
    for name in ("mid", "sft"):
        if run.mixture_file(name).is_file():
            blocks += _mixture_blocks(name, files.read_json(run.mixture_file(name), fix=DAMAGED))
    return blocks


def _mixture_blocks(stage: str, kinds: Mapping[str, Any]) -> list[Block]:
    """What a stage of conversations read, by kind."""
    rows = [
        [
            kind,
            format_percent(row["weight"]),
            format_percent(row["token_share"]),
            f"{row['rows']:,}" if row["rows"] is not None else "endless",
            f"{row['tokens']:.0f}",
            f"{row['trained']:.0f}",
            f"{row['epochs']:.2f}" if row["epochs"] is not None else "-",
        ]
        for kind, row in kinds.items()
        if isinstance(row, dict)
    ]
    if not rows and kinds:  # runs before 0.2 kept the weight alone
        told = ", ".join(f"{kind} {format_percent(weight)}" for kind, weight in kinds.items())
        return [Paragraph(f"Kinds of conversations in {stage}: {told}.")]
    header = ["kind", "weight", "of the tokens", "different", "tokens each", "learnt", "passes"]
    return [Heading(f"What {stage} read", 3), Table(header, rows)] if rows else []


def _sample_blocks(run: Run, facts: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for stage in reversed(TRAINED_STAGES):
        tasks = exams(facts["stages"].get(stage, {}))
        most = run.values["evaluate.samples"] if not blocks else TRANSCRIPTS_OF_EARLIER_STAGES
        for task in tasks:
            records = _records(run.task_samples_file(stage, task), most)
            if records:
                blocks.append(Heading(f"{stage}, {task}", 3))
                blocks.append(Listing("\n\n".join(_transcript(record) for record in records)))
    if run.samples_file("base").is_file():
        text = run.samples_file("base").read_text(encoding="utf-8")
        blocks += [Heading("base, left to itself", 3), Listing(text)]
    return [Heading("Samples"), *blocks] if blocks else []


def _records(path: Path, most: int) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(most), strict=False)]


def _transcript(record: Mapping[str, Any]) -> str:
    said = []
    for part in record.get("parts") or [{"type": "text", "text": record.get("output", "")}]:
        text = part["text"].strip()
        said.append(text if part["type"] == "text" else f"[{part['type']}: {text}]")
    mark = "right" if record.get("correct") else f"wrong, expected {record.get('answer')}"
    return f"user:      {record['question'].strip()}\nassistant: {' '.join(said)}\n({mark})"


def _made_of_blocks(run: Run) -> list[Block]:
    resolved = run.resolved
    versions = ", ".join(f"{name} {version}" for name, version in resolved["versions"].items())
    git = resolved.get("git")
    revision = "unknown (not run from a clone)"
    if git:
        revision = git["revision"] + (" with uncommitted changes" if git["changed"] else "")
    machine = resolved["hardware"]
    rules = [[key, _plain(value), resolved["rules"][key]] for key, value in run.values.items()]
    # a CPU's name says them already
    cores = "" if machine["device"] == "cpu" else f", {machine['cpu_cores']} cores"
    return [
        Heading("What it was made of"),
        Paragraph(f"Software: {versions}. Git revision: {revision}."),
        Paragraph(
            f"Hardware: {machine['name']}{cores}, "
            f"{machine['host_memory_bytes'] / 1e9:.0f} GB of memory."
        ),
        *recipe_blocks(run),
        Heading("Every number with its rule", 3),
        Table(["key", "value", "rule"], rules),
    ]


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else json.dumps(value)


def _skipped_blocks(run: Run, facts: dict[str, Any], plots: list[Plot]) -> list[Block]:
    told = []
    noted: dict[str, list[str]] = {}  # a note on the data stands in the record of every stage
    for stage in STAGES:
        if stage not in facts["stages"]:
            why = "rl.steps = 0" if stage == "rl" and not run.values["rl.steps"] else "not run"
            told.append([f"stage {stage}", why])
        for note in (run.read_stage(stage) or {}).get("notes", []):
            noted.setdefault(str(note), []).append(stage)
    told += [[f"in {_join(stages)}", note] for note, stages in noted.items()]
    for stage, table in facts["stages"].items():
        for task, score in table["scores"].items():
            if score.get("note") and not task.startswith("core/"):
                told.append([f"{stage}, {task}", score["note"]])
    if not plots and not report_plots.can_draw():
        told.append(["plots", "matplotlib is not installed: pip install 'fledge[report]'"])
    return [Heading("What was left out"), Table(["what", "why"], told)] if told else []
