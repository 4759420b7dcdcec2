"""From what a run left behind to a report for people and for programs.

`render` reads metrics.jsonl, stage.json, the exams and the samples and writes report.json,
report.md, report.html and plots/*.svg; nothing in them is entered by hand, so they can be rendered
again at any time. Called at the end of a run and by `fledge report`. It never changes a stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fledge import files, report_pages, report_plots
from fledge.config import STAGES, TRAINED_STAGES, recipe_to_toml
from fledge.errors import UserError
from fledge.fingerprint import changed_keys
from fledge.progress import format_count, format_seconds
from fledge.report_pages import Block, Heading, Listing, Paragraph, Plot, Table
from fledge.run import Run, read_metrics
from fledge.stats import format_interval

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
}

# the reading order of docs/tour.md; the report counts these lines
CORE_PATH = (
    *("config.py", "plan/scaling.py", "plan/planner.py", "run.py", "stages/pipeline.py"),
    *("tokenizer/reference.py", "tokenizer/chat.py", "tokenizer/reply.py"),
    *("data/pack.py", "data/loader.py", "model/layers.py", "model/attention.py"),
    *("model/kv_cache.py", "model/transformer.py"),
    *("optim/muon.py", "optim/groups.py", "optim/schedule.py"),
    *("train/loop.py", "train/checkpoint.py", "train/rl.py"),
    *("engine/sampling.py", "engine/scheduler.py", "engine/engine.py"),
    *("evals/bpb.py", "evals/scoring.py"),
    *("stages/context.py", "stages/training.py", "stages/tokenizer.py", "stages/base.py"),
    *("stages/chats.py", "stages/mid.py", "stages/sft.py", "stages/rl.py", "stages/evaluate.py"),
)

TRANSCRIPTS_OF_EARLIER_STAGES = 2


def render(run: Run) -> dict[str, Any]:
    """Write the report in all its forms; returns the content of report.json."""
    facts = gather(run)
    plots = _plots(run)
    for plot in plots:
        path = run.path / plot.path
        with files.refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, plot.svg)
    blocks = _blocks(run, facts, plots)
    files.write_json(run.report_file("json"), facts)
    files.write_text(run.report_file("md"), report_pages.to_markdown(blocks))
    title = f"{run.name}: report"
    files.write_text(run.report_file("html"), report_pages.to_html(blocks, title))
    return facts


# -- for programs --------------------------------------------------------------------------------


def gather(run: Run) -> dict[str, Any]:
    """report.json: sizes, and per stage its time, memory and scores (DESIGN 4.3)."""
    stages: dict[str, Any] = {}
    tokens = 0
    for stage in STAGES:
        record = run.read_stage(stage)
        if record is None:
            continue
        rows = read_metrics(run.metrics_file(stage))
        stages[stage] = {
            "status": record["status"],
            "seconds": record["seconds"],
            "peak_memory_bytes": record["peak_memory_bytes"],
            "attempts": record["attempts"],
            **_training_facts(rows),
            "scores": {**_bpb_score(run, stage, rows), **_scores(run, stage)},
        }
        tokens += stages[stage].get("tokens", 0)
    return {
        "name": run.name,
        "model": {
            "depth": run.model.num_hidden_layers,
            "parameters": run.resolved["estimates"]["parameters"],
            "training_tokens": tokens,
        },
        "stages": stages,
    }


def _training_facts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {}
    tokens = sum(row.get("tokens", row.get("sampled_tokens", 0)) for row in rows)
    seconds = sum(row.get("seconds") or 0.0 for row in rows)
    facts: dict[str, Any] = {"steps": rows[-1]["step"], "tokens": tokens}
    if seconds > 0:
        facts["tokens_per_second"] = round(tokens / seconds, 1)
    for key in ("loss", "reward", "validation_reward"):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            # one step is noisy: the mean of the last twentieth
            tail = (
                values[-max(1, len(values) // 20) :] if key != "validation_reward" else values[-1:]
            )
            facts[key] = sum(tail) / len(tail)
    return facts


def _bpb_score(run: Run, stage: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [row["bpb"] for row in rows if row.get("bpb") is not None]
    if not measured:
        return {}
    score = {
        "value": measured[-1],
        "low": None,
        "high": None,
        "n": run.values["base.eval_tokens"],
        "chance": None,
        "unit": "bits per byte",
    }
    bound = entropy_bound(run) if stage == "base" else None
    name = "bpb" if stage == "base" else "bpb_chats"
    return {name: score | ({"bound": bound} if bound is not None else {})}


def _scores(run: Run, stage: str) -> dict[str, Any]:
    """The exams of a stage's model, in a fixed order, without the file's own book-keeping."""
    scores = {}
    folder = run.evaluate_dir(stage)
    for path in sorted(folder.glob("*.json")) if stage in TRAINED_STAGES else []:
        table = _read_json(path)
        scores[path.stem] = {
            key: table.get(key) for key in ("value", "low", "high", "n", "chance", "unit")
        } | {key: table[key] for key in ("note", "seconds", "tasks") if key in table}
    return scores


def entropy_bound(run: Run) -> float | None:
    """Upper bound of the text's own entropy in bits per byte, where the world stored one."""
    if not run.entropy_file.is_file():
        return None
    return float(_read_json(run.entropy_file)["bits_per_byte"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged", str(error), "delete it and run the same command again"
        ) from None


# -- for people ----------------------------------------------------------------------------------


def _blocks(run: Run, facts: dict[str, Any], plots: list[Plot]) -> list[Block]:
    blocks: list[Block] = [
        Heading(f"{run.name}: report", 1),
        Paragraph(summary_text(run, facts)),
        Paragraph("Talk to it: `fledge chat .` in the folder of this report."),
        *_score_blocks(facts),
    ]
    if plots:
        blocks += [Heading("Curves"), *plots]
    blocks += [
        *_stage_blocks(run, facts),
        *_sample_blocks(run, facts),
        *_made_of_blocks(run),
        *_code_blocks(),
        *_skipped_blocks(run, facts, plots),
    ]
    return blocks


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
    unfinished = [name for name, stage in stages.items() if stage["status"] != "done"]
    missing = [name for name in STAGES if name not in stages and name != "rl"]
    if unfinished or missing:
        sentences.append(f"It is not finished: {', '.join(unfinished + missing)} still to do.")
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
    examined = [name for name in ("rl", "sft", "mid", "base") if _exams(stages.get(name, {}))]
    if not examined:
        return []
    last = examined[0]
    told = [
        f"{format_interval(s['value'], s['low'], s['high'])} of {TASK_WORDS.get(task, task)} "
        f"(guessing gives {100 * s['chance']:.0f} %)"
        for task, s in _exams(stages[last]).items()
    ]
    sentences = [
        f"At the end of {last} it answers right " + _join(told) + ". "
        "The numbers in brackets are 95 % intervals."
    ]
    if last == "rl" and "sft" in examined:
        before, after = _exams(stages["sft"]), _exams(stages["rl"])
        moved = [
            f"{TASK_WORDS.get(t, t)} from {100 * before[t]['value']:.1f} % to "
            f"{100 * after[t]['value']:.1f} %"
            for t in after
            if t in before and (after[t]["low"] > before[t]["high"])
        ]
        if moved:
            sentences.append(f"Reinforcement raised {_join(moved)}.")
    return sentences


def _exams(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that are shares of right answers."""
    scores = stage.get("scores", {})
    return {task: s for task, s in scores.items() if s.get("low") is not None and s.get("n")}


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
            "chance is what guessing scores. bpb: bits per byte of unseen text, bpb_chats: of "
            "unseen answers; less is better."
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
        scores = {name: stages[name]["scores"].get(task) for name in columns}
        known = [s["chance"] for s in scores.values() if s and s.get("chance") is not None]
        rows.append(
            [
                task,
                *(_cell(score) for score in scores.values()),
                f"{100 * known[0]:.0f} %" if known else "-",
            ]
        )
    return Table(["task", *columns, "chance"], rows)


def _cell(score: Mapping[str, Any] | None) -> str:
    if not score:
        return "-"
    if score.get("low") is None or not score.get("n"):
        text = f"{score['value']:.3f}"
        return text + (f" (bound {score['bound']:.3f})" if "bound" in score else "")
    return f"{format_interval(score['value'], score['low'], score['high'])}, n={score['n']}"


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
            "steps. Peak memory is the process's so far; time includes every attempt."
        ),
    ]
    if run.tokenizer_stats_file.is_file():
        stats = _read_json(run.tokenizer_stats_file)
        blocks.append(
            Paragraph(
                f"The tokenizer has {stats['vocab_size']:,} tokens, learnt from "
                f"{format_count(stats['train_bytes'])}B of text; a token covers "
                f"{stats['bytes_per_token']:.2f} bytes on average."
            )
        )
    for name in ("mid", "sft"):
        if run.mixture_file(name).is_file():
            shares = _read_json(run.mixture_file(name))
            told = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())
            blocks.append(Paragraph(f"Kinds of conversations in {name}: {told}."))
    return blocks


def _plots(run: Run) -> list[Plot]:
    series = {stage: read_metrics(run.metrics_file(stage)) for stage in TRAINED_STAGES}

    def curve(stage: str, key: str) -> report_plots.Points:
        return [(r["step"], r[key]) for r in series[stage] if r.get(key) is not None]

    def curves(key: str, stages: Iterable[str]) -> dict[str, report_plots.Points]:
        found = {stage: report_plots.thin(curve(stage, key)) for stage in stages}
        return {stage: points for stage, points in found.items() if points}

    bound = entropy_bound(run)
    wanted: list[tuple[str, str, dict[str, report_plots.Points], str]] = [
        ("loss", "Training loss", curves("loss", ("base", "mid", "sft")), "nats per token"),
        ("bpb", "Bits per byte of unseen text", curves("bpb", ("base",)), "bits per byte"),
        ("lr", "Learning rate, share of the peak", curves("lr_factor", TRAINED_STAGES), ""),
        (
            "reward",
            "Reward",
            {
                name: points
                for name, points in (
                    ("sampled", curve("rl", "reward")),
                    ("greedy, held out", curve("rl", "validation_reward")),
                )
                if points
            },
            "share of right answers",
        ),
    ]
    plots = []
    for name, title, lines, y_label in wanted:
        level = (bound, "entropy of the text") if name == "bpb" and bound is not None else None
        svg = report_plots.draw(title, lines, y_label=y_label, level=level) if lines else None
        if svg is not None:
            path = run.plot_file(name).relative_to(run.path).as_posix()
            plots.append(Plot(path, title, svg))
    return plots


def _sample_blocks(run: Run, facts: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for stage in reversed(TRAINED_STAGES):
        tasks = _exams(facts["stages"].get(stage, {}))
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
    return [
        Heading("What it was made of"),
        Paragraph(f"Software: {versions}. Git revision: {revision}."),
        Paragraph(
            f"Hardware: {machine['name']}, {machine['cpu_cores']} cores, "
            f"{machine['host_memory_bytes'] / 1e9:.0f} GB of memory."
        ),
        Heading("The recipe as it was asked for", 3),
        Listing(recipe_to_toml(run.asked)),
        Heading("Every number with its rule", 3),
        Table(["key", "value", "rule"], rules),
    ]


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if whole else json.dumps(value)


def core_path_lines() -> dict[str, int]:
    """Lines of each file of the core path that exists."""
    here = Path(__file__).parent
    found = {}
    for name in CORE_PATH:
        path = here / name
        if path.is_file():
            found[name] = len(path.read_text(encoding="utf-8").splitlines())
    return found


def _code_blocks() -> list[Block]:
    lines = core_path_lines()
    return [
        Heading("The code behind it"),
        Paragraph(
            f"The core path, from recipe to chat, is {sum(lines.values()):,} lines in "
            f"{len(lines)} files; docs/tour.md walks through them."
        ),
    ]


def _skipped_blocks(run: Run, facts: dict[str, Any], plots: list[Plot]) -> list[Block]:
    told = []
    for stage in STAGES:
        if stage not in facts["stages"]:
            why = "rl.steps = 0" if stage == "rl" and not run.values["rl.steps"] else "not run"
            told.append([f"stage {stage}", why])
        for note in (run.read_stage(stage) or {}).get("notes", []):
            told.append([f"in {stage}", str(note)])
    for stage, table in facts["stages"].items():
        for task, score in table["scores"].items():
            if score.get("note"):
                told.append([f"{stage}, {task}", score["note"]])
    if not plots and not report_plots.can_draw():
        told.append(["plots", "matplotlib is not installed: pip install 'fledge[report]'"])
    return [Heading("What was left out"), Table(["what", "why"], told)] if told else []


# -- other views ---------------------------------------------------------------------------------


def scores_text(result: Mapping[str, Any]) -> str:
    """What `fledge eval` prints for people."""
    table = score_table(result["stages"])
    model = result["model"]
    head = f"depth {model['depth']}, {format_count(model['parameters'])} parameters\n\n"
    return head + (report_pages.to_markdown([table]) if table is not None else "no task\n")


def compare(run: Run, other: Run) -> str:
    """Two runs side by side: what differs in the asking, and what came out."""
    left, right = gather(run), gather(other)
    names = (str(run.path), str(other.path))
    differences = changed_keys({"values": run.values}, {"values": other.values})
    blocks: list[Block] = [
        Heading(f"{run.name} and {other.name}", 1),
        Paragraph(f"A: {names[0]}. B: {names[1]}."),
        Heading("Settings that differ (A -> B)"),
        Listing("\n".join(differences) or "none"),
        Heading("Scores"),
        Table(["stage", "task", "A", "B", "B - A"], _score_pairs(left, right)),
        Heading("Time and memory"),
        Table(["stage", "A", "B"], _cost_pairs(left, right)),
    ]
    return report_pages.to_markdown(blocks)


def _score_pairs(left: dict[str, Any], right: dict[str, Any]) -> list[list[str]]:
    rows = []
    for stage in TRAINED_STAGES:
        a = left["stages"].get(stage, {}).get("scores", {})
        b = right["stages"].get(stage, {}).get("scores", {})
        for task in {**a, **b}:
            change = "-"
            if task in a and task in b:
                change = f"{b[task]['value'] - a[task]['value']:+.3f}"
                if _apart(a[task], b[task]):
                    change += " (intervals apart)"
            rows.append([stage, task, _cell(a.get(task)), _cell(b.get(task)), change])
    return rows


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if any(score.get(end) is None for score in (a, b) for end in ("low", "high")):
        return False
    return a["high"] < b["low"] or b["high"] < a["low"]


def _cost_pairs(left: dict[str, Any], right: dict[str, Any]) -> list[list[str]]:
    def cell(facts: dict[str, Any], stage: str) -> str:
        found = facts["stages"].get(stage)
        if found is None:
            return "-"
        return f"{format_seconds(found['seconds'])}, {found['peak_memory_bytes'] / 1e9:.2f} GB"

    return [[stage, cell(left, stage), cell(right, stage)] for stage in STAGES]
