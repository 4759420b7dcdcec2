"""From what a run left behind to a report for people and for programs.

`render` reads metrics.jsonl, stage.json, the exams and the samples and writes report.json,
report.md, report.html and plots/*.svg; nothing in them is entered by hand, so they can be rendered
again at any time. Called at the end of a run and by `fledge report`. It never changes a stage.
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fledge import files, report_blocks, report_pages, report_plots
from fledge.config import STAGES, TRAINED_STAGES
from fledge.fingerprint import changed_keys
from fledge.progress import format_count, format_seconds
from fledge.report_blocks import cell, score_table
from fledge.report_brief import answers, exams
from fledge.report_pages import Block, Heading, Listing, Paragraph, Plot, Table
from fledge.report_sections import core_tasks_table
from fledge.report_trouble import DAMAGED
from fledge.run import Run
from fledge.runlog import read_metrics
from fledge.stats import paired_bootstrap

# the reading order of docs/tour.md; the report counts these lines
CORE_PATH = (
    *("config.py", "plan/scaling.py", "plan/planner.py", "resolved.py", "run.py"),
    "stages/pipeline.py",
    *("tokenizer/reference.py", "tokenizer/chat.py", "tokenizer/reply.py"),
    *("data/pack.py", "data/loader.py", "model/layers.py", "model/attention.py"),
    *("model/kv_cache.py", "model/transformer.py"),
    *("optim/muon.py", "optim/groups.py", "optim/schedule.py"),
    *("train/loop.py", "train/checkpoint.py", "train/rl.py"),
    *("engine/sampling.py", "engine/scheduler.py", "engine/engine.py"),
    *("evals/bpb.py", "evals/scoring.py", "evals/examine.py"),
    *("stages/context.py", "stages/training.py", "stages/tokenizer.py", "stages/base.py"),
    *("stages/chats.py", "stages/mid.py", "stages/sft.py", "stages/rl.py", "stages/evaluate.py"),
)


def render(run: Run) -> dict[str, Any]:
    """Write the report in all its forms; returns the content of report.json."""
    facts = gather(run)
    plots = _plots(run, facts)
    for plot in plots:
        files.write_text(run.path / plot.path, plot.svg)
    blocks = report_blocks.page(run, facts, plots, Paragraph(core_path_text()))
    files.write_json(run.report_file("json"), facts)
    files.write_text(run.report_file("md"), report_pages.to_markdown(blocks))
    title = f"{run.name}: report"
    files.write_text(run.report_file("html"), report_pages.to_html(blocks, title))
    return facts


# -- for programs --------------------------------------------------------------------------------


def gather(run: Run) -> dict[str, Any]:
    """report.json: sizes, and per stage its time, memory and scores (DESIGN 4.3)."""
    stages: dict[str, Any] = {}
    planned = run.resolved["estimates"]["stages"]
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
            "planned_seconds": planned.get(stage, {}).get("seconds"),
            **_training_facts(rows),
            "scores": {**_bpb_score(run, stage, rows), **_scores(run, stage)},
        }
        tokens += stages[stage].get("tokens", 0)
        if run.chat_file(stage).is_file():
            table = files.read_json(run.chat_file(stage), {"scores": dict}, fix=DAMAGED)
            stages[stage]["chat"] = table["scores"]
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


_ALWAYS = ("value", "low", "high", "n", "chance", "unit")
_MAYBE = ("note", "seconds", "tasks", "stderr", "truncated", "pass_at_k")
_OF_CORE = ("centred_v1", "centred_v2", "shots", "profile")


def _scores(run: Run, stage: str) -> dict[str, Any]:
    """The exams of a stage's model, in a fixed order, without the file's own book-keeping.

    Those of the evaluate stage, then those that `fledge eval` took of the last checkpoint.
    """
    if stage not in TRAINED_STAGES:
        return {}
    scores: dict[str, Any] = {}
    for folder in _exam_folders(run, stage):
        for path in sorted(folder.glob("*.json")):
            table = files.read_json(path, fix=DAMAGED)
            if path.stem == "core":
                tasks = {f"core/{n}": _score(t, _OF_CORE) for n, t in table["tasks"].items()}
                found = table["scores"] | tasks
            else:
                found = {path.stem: _score(table)}
            scores |= {name: score for name, score in found.items() if name not in scores}
    return scores


def _exam_folders(run: Run, stage: str) -> list[Path]:
    """Where exams of the stage's last checkpoint lie, the evaluate stage's own first."""
    last = run.latest_checkpoint(stage)
    folders = [run.evaluate_dir(stage)]
    return folders + ([run.step_evals_dir(stage, last.name)] if last is not None else [])


def _score(table: Mapping[str, Any], more: tuple[str, ...] = ()) -> dict[str, Any]:
    known = {key: table.get(key) for key in _ALWAYS}
    return known | {key: table[key] for key in (*_MAYBE, *more) if key in table}


def entropy_bound(run: Run) -> float | None:
    """Upper bound of the text's own entropy in bits per byte, where the world stored one."""
    if not run.entropy_file.is_file():
        return None
    return float(files.read_json(run.entropy_file, fix=DAMAGED)["bits_per_byte"])


def _plots(run: Run, facts: Mapping[str, Any]) -> list[Plot]:
    return [*_score_plots(run, facts["stages"]), *_curve_plots(run), *_memory_plot(run, facts)]


def _curve_plots(run: Run) -> list[Plot]:
    series = {stage: read_metrics(run.metrics_file(stage)) for stage in TRAINED_STAGES}
    peak = run.resolved["hardware"].get("peak_flops")
    per_token = run.resolved["estimates"].get("flops_per_token")
    share = 100 * per_token / peak if peak and per_token else None

    def curve(stage: str, key: str, scale: float = 1.0) -> report_plots.Points:
        rows = ((r["step"], r.get(key)) for r in series[stage])
        return report_plots.thin([(step, scale * y) for step, y in rows if y is not None])

    def curves(key: str, stages: Iterable[str], scale: float = 1.0) -> dict[str, Any]:
        found = {stage: curve(stage, key, scale) for stage in stages}
        return {stage: points for stage, points in found.items() if points}

    rewards = {
        "sampled": curve("rl", "reward"),
        "greedy, held out": curve("rl", "validation_reward"),
        "right at least once in a group": curve("rl", "pass_at_k"),
    }
    finished = {
        "finished by themselves": curve("rl", "finished_fraction"),
        "of use to the gradient": curve("rl", "useful_fraction"),
        "cut or clipped (of tokens)": curve("rl", "clip_fraction"),
    }
    tps, trained = "tokens_per_second", ("base", "mid", "sft")
    wanted: list[tuple[str, str, dict[str, Any], str]] = [
        ("loss", "Training loss", curves("loss", trained), "nats per token"),
        ("bpb", "Bits per byte of unseen text", curves("bpb", ("base",)), "bits per byte"),
        ("lr", "Learning rate", curves("lr_factor", TRAINED_STAGES), "share of the peak"),
        ("speed", "Throughput", curves(tps, TRAINED_STAGES), "tokens per second"),
        ("chatcore", "ChatCORE on the way", curves("chatcore", ("mid", "sft")), "centred accuracy"),
        ("reward", "Reward", _some(rewards), "share of right answers"),
        ("rollouts", "Sampled answers", _some(finished), "share of the answers"),
        ("entropy", "Entropy of the next token in rl", curves("entropy", ("rl",)), "nats"),
    ]
    if share is not None:
        found = curves(tps, trained, share)
        wanted.insert(4, ("mfu", "Use of the machine (MFU)", found, "% of the assumed peak"))
    bound = entropy_bound(run)
    plots = []
    for name, title, lines, y_label in wanted:
        level = (bound, "entropy of the text") if name == "bpb" and bound is not None else None
        svg = (
            report_plots.draw(
                title,
                lines,
                x_label="optimizer step of the stage",
                y_label=y_label,
                level=level,
                from_zero=name in ("speed", "mfu", "lr", "reward", "rollouts"),
            )
            if lines
            else None
        )
        plots += _plot(run, name, title, svg, "curves")
    return plots


def _some(curves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: points for name, points in curves.items() if points}


def _score_plots(run: Run, stages: Mapping[str, Any]) -> list[Plot]:
    """Exams by stage beside chance, and CORE task by task."""
    groups, chance = {}, {}
    core: dict[str, list[report_plots.Bar]] = {}
    for stage, table in stages.items():
        found = exams(table)
        if found:
            groups[stage] = [
                (task, 100 * s["value"], 100 * s["low"], 100 * s["high"])
                for task, s in found.items()
            ]
            chance |= {task: 100 * s["chance"] for task, s in found.items()}
        tasks = {n.removeprefix("core/"): s for n, s in table["scores"].items() if "/" in n}
        if tasks:
            core[stage] = [(n, *_centred(s)) for n, s in tasks.items()]
    x_label = "right answers, % (bars: 95 % interval)"
    plots = []
    if groups:
        title = "Exams by stage"
        svg = report_plots.bars(title, groups, x_label=x_label, marks=chance, mark_label="guessing")
        plots += _plot(run, "scores", title, svg, "scores")
    if core:
        title = "CORE by task, centred (v1)"
        svg = report_plots.bars(title, core, x_label="centred accuracy (bars: 95 % interval)")
        plots += _plot(run, "core", title, svg, "core")
    return plots


def _memory_plot(run: Run, facts: Mapping[str, Any]) -> list[Plot]:
    sizes = {stage: t["peak_memory_bytes"] / 1e9 for stage, t in facts["stages"].items()}
    memory = [(stage, size, size, size) for stage, size in sizes.items() if size]
    if not memory:
        return []
    title = "Largest memory of the process by stage"
    svg = report_plots.bars(title, {"memory": memory}, x_label="GB, highest so far")
    return _plot(run, "memory", title, svg, "curves")


def _centred(score: Mapping[str, Any]) -> tuple[float, float, float]:
    """(value, low, high) of a CORE task's accuracy, centred by its v1 baseline."""
    low, value, high = (
        (score[key] - score["chance"]) / (1 - score["chance"]) for key in ("low", "value", "high")
    )
    return value, low, high


def _plot(run: Run, name: str, title: str, svg: str | None, place: str) -> list[Plot]:
    if svg is None:
        return []
    return [Plot(run.plot_file(name).relative_to(run.path).as_posix(), title, svg, place)]


def core_path_lines() -> dict[str, tuple[int, int]]:
    """File of the core path -> (lines of code, all its lines)."""
    sources = {
        name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in CORE_PATH
    }
    return {name: (code_lines(text), len(text.splitlines())) for name, text in sources.items()}


def code_lines(source: str) -> int:
    """Lines of Python without blank lines, comments and docstrings."""
    lines: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if any(part.type != tokenize.STRING for part in statement):
                lines.update(n for t in statement for n in range(t.start[0], t.end[0] + 1))
            statement.clear()
        elif token.type not in layout:
            statement.append(token)
    return len(lines)


def core_path_text() -> str:
    """How long the core path is, and what was counted."""
    counts = core_path_lines()
    code, physical = map(sum, zip(*counts.values(), strict=True))
    return (
        f"The core path, from recipe to chat, is {code:,} lines of code in {len(counts)} files "
        f"({physical:,} with blank lines, comments and docstrings): those that docs/tour.md walks "
        "through. Not counted are the worlds, the readers of text and task files, the sandbox, "
        "this report, the command line and smaller helpers. The whole package has "
        f"{_whole_package()}."
    )


def _whole_package() -> str:
    """Files and lines of all of fledge, and how many libraries it asks for."""
    from importlib import metadata

    sources = [p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.rglob("*.py"))]
    code, physical = sum(map(code_lines, sources)), sum(len(s.splitlines()) for s in sources)
    try:
        asked = metadata.requires("fledge") or []
    except metadata.PackageNotFoundError:
        asked = []
    needed = sum(1 for line in asked if "extra ==" not in line)
    text = f"{code:,} lines of Python code in {len(sources)} files ({physical:,} in all)"
    return text + (f" and needs {needed} libraries" if needed else "")


# -- other views ---------------------------------------------------------------------------------


def scores_text(result: Mapping[str, Any]) -> str:
    """What `fledge eval` prints for people."""
    table = score_table(result["stages"])
    model = result["model"]
    head = f"depth {model['depth']}, {format_count(model['parameters'])} parameters\n\n"
    blocks: list[Block] = [table] if table is not None else [Paragraph("no task")]
    core = core_tasks_table(result["stages"])
    if core is not None:
        blocks += [Heading("CORE by task", 3), core]
    told = [
        f"{task}: {score['note']}"
        for stage in result["stages"].values()
        for task, score in stage["scores"].items()
        if score.get("note") and not task.startswith("core/")
    ]
    told += result.get("notes", [])
    if told:
        blocks.append(Paragraph("\n".join(f"- {line}" for line in told)))
    return head + report_pages.to_markdown(blocks)


def comparison_text(table: Mapping[str, Any]) -> str:
    """What `fledge eval A --compare B` prints for people."""
    rows = []
    for name, row in table["tasks"].items():
        percent = not name.startswith(("core_", "chatcore"))
        rows.append(
            [
                name,
                _number(row["before"], percent=percent),
                _number(row["after"], percent=percent),
                difference_text(row, percent=percent),
                f"{row['n']:,}",
            ]
        )
    blocks: list[Block] = [
        Paragraph(f"A: {table['a']}. B: {table['b']}."),
        Table(["task", "A", "B", "B - A (95 %, paired)", "n"], rows),
        Paragraph(
            "Paired bootstrap over the examples that both answered; a star marks a difference "
            "whose interval leaves out 0. It is the noise of the questions alone: another training "
            "run of the same recipe moves CORE by about 0.006 (nanochat PR 807)."
        ),
    ]
    return report_pages.to_markdown(blocks)


def _number(value: float, *, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.4f}"


def difference_text(row: Mapping[str, Any], *, percent: bool) -> str:
    """ "+3.1 (+1.0 to +5.2) *": a difference with its interval, starred if 0 is outside."""
    parts = [row["difference"], row["low"], row["high"]]
    value, low, high = [f"{100 * x:+.1f}" if percent else f"{x:+.4f}" for x in parts]
    return f"{value} ({low} to {high})" + (" *" if row["significant"] else "")


def compare(run: Run, other: Run) -> str:
    """Two runs side by side: what differs in the asking, and what came out."""
    left, right = gather(run), gather(other)
    differences = changed_keys({"values": run.values}, {"values": other.values})
    blocks: list[Block] = [
        Heading(f"{run.name} and {other.name}", 1),
        Paragraph(f"A: {run.path}. B: {other.path}."),
        Heading("In brief"),
        Table(["question", "A", "B"], _answer_pairs(run, other, left, right)),
        Heading("Settings that differ (A -> B)"),
        Listing("\n".join(differences) or "none"),
        Heading("Scores"),
        Table(["stage", "task", "A", "B", "B - A"], _score_pairs(run, other, left, right)),
        Paragraph(
            "A star marks a difference whose 95 % interval leaves out 0: a paired bootstrap where "
            "both runs kept their answers to the same questions, else the two intervals lie apart. "
            "A difference without an interval is of a number that has none (bits per byte) or of a "
            "mean of several exams. Another training run of the same recipe differs too: CORE by "
            "about 0.006 (nanochat PR 807)."
        ),
        Heading("Time and memory"),
        Table(["stage", "A", "B"], _cost_pairs(left, right)),
    ]
    return report_pages.to_markdown(blocks)


def _answer_pairs(
    run: Run, other: Run, left: dict[str, Any], right: dict[str, Any]
) -> list[list[str]]:
    """The ten questions with the answers of both; how they compare stands in the tables below."""
    pairs = zip(answers(run, left), answers(other, right), strict=True)
    return [[question, a, b] for (question, a), (_, b) in pairs if "Compared" not in question]


def _score_pairs(
    run: Run, other: Run, left: dict[str, Any], right: dict[str, Any]
) -> list[list[str]]:
    rows = []
    for stage in TRAINED_STAGES:
        a = left["stages"].get(stage, {}).get("scores", {})
        b = right["stages"].get(stage, {}).get("scores", {})
        for task in {**a, **b}:
            change = "-"
            if task in a and task in b:
                paired = _paired(run, other, stage, task)
                if paired is not None:
                    change = difference_text(paired, percent=True)
                else:
                    change = f"{b[task]['value'] - a[task]['value']:+.3f}"
                    change += " (intervals apart) *" if _apart(a[task], b[task]) else ""
            rows.append([stage, task, cell(a.get(task)), cell(b.get(task)), change])
    return rows


def _paired(run: Run, other: Run, stage: str, task: str) -> dict[str, Any] | None:
    """The paired difference on the examples that both runs kept, or None without any."""
    a, b = _example_scores(run, stage, task), _example_scores(other, stage, task)
    shared = [key for key in a if key in b]
    if not shared:
        return None
    return paired_bootstrap([a[key] for key in shared], [b[key] for key in shared])


def _example_scores(run: Run, stage: str, task: str) -> dict[str, float]:
    """Score by example of a task; the question is part of the key: worlds of two seeds number
    different questions alike."""
    for folder in _exam_folders(run, stage):
        path = folder / f"{task}.samples.jsonl"
        if path.is_file():
            rows = read_metrics(path)  # JSON lines; one that a crash cut is left out
            keyed = ((f"{r['id']} {r.get('question')}", r.get("score", r["correct"])) for r in rows)
            return {key: float(score) for key, score in keyed}
    return {}


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
