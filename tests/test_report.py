"""fledge.report: the same bytes for the same run, its shape, and honest words when parts lack."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fledge import report, report_blocks, report_plots
from fledge.report_pages import Heading, Listing, Paragraph, Table, to_html, to_markdown
from fledge.run import Run
from tests.helpers_run import do_stage, finished_run, open_run, write_training

VOID = {"meta", "link", "br", "hr", "img", "path", "use", "rect", "line"}


class WellFormed(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack and self.stack.pop() == tag, tag


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = finished_run(tmp_path_factory.mktemp("report") / "tiny")
    report.render(run)
    return run


def test_report_json_has_the_documented_shape(run: Run) -> None:
    facts = json.loads(run.report_file("json").read_text())
    assert set(facts["model"]) == {"depth", "parameters", "training_tokens"}
    assert list(facts["stages"]) == ["tokenizer", "base", "mid", "sft", "rl", "evaluate"]
    for stage in facts["stages"].values():
        assert {"seconds", "peak_memory_bytes", "scores"} <= set(stage)
        for score in stage["scores"].values():
            assert {"value", "low", "high", "n", "chance", "unit"} <= set(score)
    assert facts["stages"]["base"]["scores"]["bpb"]["value"] == pytest.approx(1.6)
    assert facts["stages"]["base"]["scores"]["bpb"]["bound"] == 1.4
    assert facts["model"]["training_tokens"] == 4 * 40 * 2048


def test_the_first_paragraph_can_be_read_aloud(run: Run) -> None:
    text = report_blocks.summary_text(run, report.gather(run))
    assert "from nothing on the built-in world village" in text
    assert "80.0 % (75.0 to 85.0) of questions about facts (guessing gives 5 %)" in text
    assert "1.600 bits for each byte" in text and "about 1.400" in text
    assert "Reinforcement raised questions about facts from 60.0 % to 80.0 %" in text
    assert "_" not in text.replace("world_", "")


def test_markdown_holds_every_section(run: Run) -> None:
    text = run.report_file("md").read_text()
    for heading in (
        "Scores",
        "Curves",
        "Stages",
        "Samples",
        "What it was made of",
        "The code behind it",
    ):
        assert f"\n## {heading}\n" in text
    assert "[python: 0 + 2] [output: 2] It is 2." in text
    assert "wrong, expected 3" in text
    assert "The cat sat." in text
    assert "| base.matrix_lr | 0.03 |" in text


def test_rendering_again_gives_the_same_bytes(run: Run) -> None:
    paths = [run.report_file("json"), run.report_file("md"), run.report_file("html")]
    paths += sorted((run.path / "plots").iterdir())
    assert {p.stem for p in paths} >= {"loss", "bpb", "lr", "reward", "scores", "memory"}
    before = [path.read_bytes() for path in paths]
    report.render(Run.read(run.path))
    assert [path.read_bytes() for path in paths] == before


def test_html_is_one_well_formed_page_with_its_plots(run: Run) -> None:
    text = run.report_file("html").read_text()
    page = WellFormed()
    page.feed(text)
    assert page.stack == []
    assert text.count("<svg") == len(list((run.path / "plots").iterdir())) == 6
    assert "src=" not in text and "<script" not in text


def test_without_matplotlib_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_plots, "can_draw", lambda: False)
    run = finished_run(tmp_path / "r")
    report.render(run)
    text = run.report_file("md").read_text()
    assert "matplotlib is not installed" in text and "## Curves" not in text


def test_a_run_that_only_began(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        do_stage(run, "base", status="interrupted")
        write_training(run, "base", steps=5)
        facts = report.render(run)
        text = run.report_file("md").read_text()
    assert facts["stages"]["base"]["status"] == "interrupted"
    assert (
        "It is not finished: base, mid, sft, rl and evaluate still to do. The same `fledge run`"
        in text
    )
    assert "| stage rl | not run |" in text


def test_two_runs_side_by_side(run: Run, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other")
    path = other.task_file("rl", "world_math")
    path.write_text(path.read_text().replace("0.8", "0.5").replace("0.75", "0.45"))
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"value": 0.5, "low": 0.45, "high": 0.55}))
    text = report.compare(run, other)
    # both kept four answers to the same questions, all alike: nothing to star
    assert "+0.0 (+0.0 to +0.0)" in text and " *" not in text.split("A star")[0]
    assert "| rl | world_facts |" in text and "+0.000" in text
    assert "\nnone\n" in text  # no setting differs


def test_scores_text() -> None:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 96, "chance": 0.25, "unit": "accuracy"}
    result = {
        "model": {"depth": 4, "parameters": 4_262_656},
        "stages": {"sft": {"scores": {"mmlu": score}}},
    }
    text = report.scores_text(result)
    assert "50.0 % (40.0 to 60.0)" in text and "| 96" in text and "25 %" in text and "4.26M" in text


def test_pages_escape_what_users_wrote() -> None:
    blocks = [
        Heading("A & B", 1),
        Paragraph("<script>alert(1)</script>"),
        Table(["a"], [["x | y\nz"]]),
        Listing("```\ncode\n```"),
    ]
    page = to_html(blocks, "<t>")
    assert "<script>" not in page and "<t>" not in page
    text = to_markdown(blocks)
    assert "x \\| y z" in text and "````\n```\ncode" in text


def test_core_path_counts_real_files() -> None:
    lines = report.core_path_lines()
    assert tuple(lines) == report.CORE_PATH
    code, physical = lines["config.py"]
    assert 100 < code < physical


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings() -> None:
    source = '''"""A module."""

# a comment
X = 1  # code
"""Its docstring."""


def f(
    a: str,
) -> str:
    """Two
    lines."""
    return """code
that goes on"""
'''
    assert report.code_lines(source) == 6


def test_thin_keeps_ends_and_means() -> None:
    points = [(float(i), float(i)) for i in range(1000)]
    thinned = report_plots.thin(points, 100)
    assert len(thinned) == 100 and thinned[-1][0] == 999
    assert sum(y for _, y in thinned) / 100 == pytest.approx(499.5)


# -- what a run may have beside the plain ----------------------------------------------------------


def write_core(run: Run, folder: Path) -> None:
    from fledge.evals.core import CORE_TASKS
    from fledge.evals.examine import TaskResult
    from fledge.evals.suite import core_table

    results = []
    for i, task in enumerate(CORE_TASKS):
        value = 0.3 + i / 100
        details = {"profile": "nanochat", "shots": task.shots, "truncated": i, "guessing": 0.25}
        details |= {f"centred_{v}": task.centred(value, v) for v in ("v1", "v2")}
        records = [{"id": f"{j}", "question": "q", "score": float(j < 30)} for j in range(100)]
        results.append(
            TaskResult(
                f"core/{task.name}",
                value,
                value - 0.1,
                value + 0.1,
                100,
                0.01 * task.baseline_v1,
                1.0,
                records,
                None,
                0.05,
                details,
            )
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "core.json").write_text(json.dumps(core_table(results, profile="nanochat")))


def test_core_of_the_base_model_stands_in_the_report(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r")
    write_core(run, run.step_evals_dir("base", "step_000040"))
    facts = report.render(run)
    scores = facts["stages"]["base"]["scores"]
    assert scores["core_v1"]["unit"] == "centred accuracy" and scores["core_v1"]["n"] == 2200
    text = run.report_file("md").read_text()
    assert "| core_v1 | 0." in text and "| core_v2 | 0." in text
    assert "\n## CORE by task\n" in text and "| commonsense_qa |" in text
    assert "21 of 100" in text  # prompts that were cut, of the last task
    assert run.plot_file("core").is_file()
    # one row a task in its own table, none in the summary
    assert text.count("| bigbench_operators |") == 1 and "| core/" not in text


def test_a_failed_run_says_where_and_why(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        parts = run.stage_parts("base", data={"world": "village"})
        run.begin_stage("base", parts)
        run.end_stage("base", "failed", seconds=3.0, error="RuntimeError: the loss is not finite")
        run.log_file("base").write_text("step 4\nstep 5 loss nan\n")
        report.render(run)
        text = run.report_file("md").read_text()
    assert "It failed in base: see what went wrong." in text
    section = text.partition("## What went wrong")[2].partition("\n## ")[0]
    assert "base failed after 3 s: RuntimeError: the loss is not finite" in section
    assert "step 5 loss nan" in section


def test_no_page_shows_a_number_that_is_none(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "done")]
    with open_run(tmp_path / "begun") as begun:
        do_stage(begun, "tokenizer", status="interrupted")
    runs.append(begun)
    for run in runs:
        report.render(run)
        shown = run.report_file("html").read_text().partition("<body>")[2]
        shown = shown.partition("What it was made of")[0]
        for bad in ("nan", "NaN", "None", "null", "undefined", "inf "):
            assert f" {bad}" not in shown and f">{bad}<" not in shown, (run.path, bad)


def test_the_plan_stands_beside_the_time_it_took(run: Run) -> None:
    text = run.report_file("md").read_text()
    assert "| stage | planned | actual | actual / planned |" in text
    facts = json.loads(run.report_file("json").read_text())
    assert facts["stages"]["base"]["planned_seconds"] > 0


def test_overlap_is_told_where_it_was_looked_for(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r")
    found = {"items": 1319, "too_short": 2, "overlapped": 3, "share": 3 / 1319,
             "examples": [{"id": "gsm8k/7", "words": "natalia sold clips to"}]}  # fmt: skip
    table = {"words": 13, "documents": 9, "bytes": 5_000_000, "tasks": {"gsm8k": found}}
    run.overlap_file.parent.mkdir(parents=True, exist_ok=True)
    run.overlap_file.write_text(json.dumps(table | {"notes": []}))
    report.render(run)
    text = run.report_file("md").read_text()
    assert "| gsm8k | 1,319 | 3 | 0.23 % | 2 | natalia sold clips to |" in text


def test_two_runs_are_paired_where_they_answered_the_same(tmp_path: Path) -> None:
    a, b = finished_run(tmp_path / "a"), finished_run(tmp_path / "b")
    for run, right in ((a, 0.5), (b, 0.6)):
        rows = [{"id": str(i), "question": "q", "correct": i < 200 * right} for i in range(200)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        run.task_samples_file("rl", "world_math").write_text(lines)
    text = report.compare(a, b)
    row = next(line for line in text.splitlines() if line.startswith("| rl | world_math"))
    assert "+10.0 (+" in row and row.rstrip(" |").endswith("*")
    # other questions under the same numbers are no pairs
    rows = [{"id": str(i), "question": "other", "correct": True} for i in range(200)]
    b.task_samples_file("rl", "world_math").write_text("".join(json.dumps(r) + "\n" for r in rows))
    row = next(x for x in report.compare(a, b).splitlines() if x.startswith("| rl | world_math"))
    assert "to +" not in row


def test_lines_differ_in_more_than_colour() -> None:
    svg = report_plots.draw("t", {"a": [(0, 1), (1, 2)], "b": [(0, 2), (1, 1)]}, y_label="nats")
    assert svg is not None
    assert "stroke-dasharray" in svg and "#0072b2" in svg and "#d55e00" in svg
    assert ">nats<" in svg and ">step<" in svg


def test_the_look_at_the_chat_stands_in_the_report(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "tiny")
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 64, "chance": None, "unit": "share"}
    bits = score | {"value": 0.125, "low": None, "high": None, "unit": "bits per byte"}
    run.chat_file("sft").parent.mkdir(parents=True)
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    table = {"model": "x", "dialogues": 64, "scores": {"stops": score, "bpb": bits}}
    run.chat_file("sft").write_text(json.dumps(table))
    run.chat_samples_file("sft").write_text((json.dumps(talk) + "\n") * 25)
    facts = report.render(run)
    assert facts["stages"]["sft"]["chat"]["stops"] == score and "chat" not in facts["stages"]["mid"]
    page = run.report_file("md").read_text()
    assert "| replies that end by themselves | 50.0 % (40.0 to 60.0), n = 64 |" in page
    assert "| bits per byte of the assistant's part | 0.125 |" in page
    assert "sft: the first 20 dialogues, unpicked" in page
    assert page.count("user:      Hi\nassistant: Yo") == 20
