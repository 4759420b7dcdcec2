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
    paths += [run.plot_file(name) for name in ("loss", "bpb", "lr", "reward")]
    before = [path.read_bytes() for path in paths]
    report.render(Run.read(run.path))
    assert [path.read_bytes() for path in paths] == before


def test_html_is_one_well_formed_page_with_its_plots(run: Run) -> None:
    text = run.report_file("html").read_text()
    page = WellFormed()
    page.feed(text)
    assert page.stack == []
    assert text.count("<svg") == 4
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
    assert "It is not finished: base, mid, sft, evaluate still to do." in text
    assert "| stage rl | not run |" in text


def test_two_runs_side_by_side(run: Run, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other")
    path = other.task_file("rl", "world_math")
    path.write_text(path.read_text().replace("0.8", "0.5").replace("0.75", "0.45"))
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"value": 0.5, "low": 0.45, "high": 0.55}))
    text = report.compare(run, other)
    assert "-0.300 (intervals apart)" in text
    assert "| rl | world_facts |" in text and "+0.000" in text
    assert "\nnone\n" in text  # no setting differs


def test_scores_text() -> None:
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 96, "chance": 0.25, "unit": "accuracy"}
    result = {
        "model": {"depth": 4, "parameters": 4_262_656},
        "stages": {"sft": {"scores": {"mmlu": score}}},
    }
    text = report.scores_text(result)
    assert "50.0 % (40.0 to 60.0), n=96" in text and "25 %" in text and "4.26M" in text


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
