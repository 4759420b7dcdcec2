"""The report in brief: ten answers that trace to files, troubles, shares, what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fledge import config, report
from fledge.report_brief import WORDS, answers, corpus, expected_of_recipe
from fledge.report_trouble import troubles
from fledge.run import Run
from fledge.runlog import MetricsLog
from fledge.stats import format_percent
from tests.helpers_run import (
    do_stage,
    finished_run,
    open_run,
    plan_of,
    write_exam,
    write_training,
)

QUESTIONS = (
    "What was trained?",
    "On what?",
    "How many passes over it?",
    "How long did it take?",
    "With which context length?",
    "How good is it?",
    "Compared with what?",
    "What went wrong?",
    "How was it started?",
    "From which source tree?",
)


def told(run: Run) -> dict[str, str]:
    return dict(answers(run, report.gather(run)))


def resolved_with(run: Run, **facts: Any) -> Run:
    table = json.loads(run.resolved_file.read_text())
    run.resolved_file.write_text(json.dumps(table | facts))
    return Run.read(run.path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return finished_run(tmp_path / "tiny")


def test_ten_questions_are_answered_below_the_summary(run: Run) -> None:
    report.render(run)
    text = run.report_file("md").read_text()
    brief = text.partition("\n## In brief\n")[2].partition("\n## ")[0]
    for question in QUESTIONS:
        assert f"| {question} | " in brief
    assert text.index("## In brief") < text.index("## Scores")
    found = told(run)
    assert "689,024 parameters, 2 layers of width 128" in found["What was trained?"]
    assert "base 81.9K, mid 81.9K" in found["What was trained?"]
    assert "The built-in world village (seed 0)" in found["On what?"]
    assert "about 246 kB of text" in found["On what?"]  # 40 steps of 2,048 tokens of 3 bytes
    assert "no document comes twice" in found["How many passes over it?"]
    assert found["With which context length?"] == "256 tokens, about 768 bytes of text."
    assert "world_facts 80.0 % (75.0 to 85.0)" in found["How good is it?"]
    assert "2 of 2 exams of rl lie above it" in found["Compared with what?"]
    assert "3.33 if every token were equally likely, 1.400 at best" in found["Compared with what?"]
    assert found["What went wrong?"].startswith("Nothing")


def test_time_stands_against_the_time_that_was_planned(run: Run) -> None:
    planned = sum(s["seconds"] for s in run.resolved["estimates"]["stages"].values())
    assert (
        f"of {planned:.0f} s planned ({9 / planned:.2f} times" in told(run)["How long did it take?"]
    )
    report.render(run)
    row = next(
        line for line in run.report_file("md").read_text().splitlines() if "| together |" in line
    )
    assert row.startswith(f"| together | {planned:.0f} s | 9 s | {9 / planned:.2f} ")


@pytest.mark.parametrize(
    ("kept", "size", "passes"),
    [
        (
            {"shards": 4, "stored_bytes": 1_500_000, "documents_read": 409, "passes": 0.818},
            "1.5 MB in 4 shards",
            "Base: 0.82 (409 documents).",
        ),
        (
            {"documents": 500, "bytes": 300_000},
            "300 kB of text in 500 documents, about 100K tokens",
            "Base: about 0.82.",
        ),
        (
            {"shards": 1800, "stored_bytes": 160_000_000_000},
            "160 GB in 1,800 shards as they are stored",
            "Base: not known",
        ),
    ],
)
def test_size_and_passes_of_a_text(run: Run, kept: dict[str, Any], size: str, passes: str) -> None:
    run.corpus_file.write_text(json.dumps({"source": "/texts", **kept}))
    found = told(run)
    assert f"The text in /texts: {size}" in found["On what?"]
    assert passes in found["How many passes over it?"]


def test_passes_of_the_conversations(run: Run) -> None:
    row = {"weight": 0.5, "token_share": 0.5, "rows": 10, "tokens": 5.0, "trained": 2.0}
    kinds = {"chat": row | {"epochs": 3.25}, "spell": row | {"rows": None, "epochs": None}}
    run.mixture_file("mid").write_text(json.dumps(kinds))
    run.mixture_file("sft").write_text(json.dumps({"spell": kinds["spell"]}))
    found = told(run)["How many passes over it?"]
    assert "mid: at most 3.25, of chat." in found and "sft: none" in found


def test_an_older_run_tells_what_its_record_has(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r")
    record = json.loads(run.stage_file("base").read_text())
    files = [["a.zst", 1_000_000, "x"], ["b.zst", 500_000, "y"]]
    record["parts"]["data"] = {"text": files, "world": {"facts": 7}}
    run.stage_file("base").write_text(json.dumps(record))
    run.resolved["values"]["data.source"] = "/texts"
    assert corpus(run) == {"source": "/texts", "files": 2, "stored_bytes": 1_500_000}
    run.resolved["values"]["data.source"] = None
    assert corpus(run)["facts"] == 7


def test_the_command_and_the_state_of_the_tree(run: Run) -> None:
    assert "did not keep it" in told(run)["How was it started?"]
    origin = {
        "command": "fledge run tiny --model.depth 3",
        "expected": "all is well",
        "overrides": [],
    }
    git = {"revision": "abc123", "changed": True}
    again = resolved_with(run, origin=origin, git=git)
    found = told(again)
    assert found["How was it started?"] == "`fledge run tiny --model.depth 3`"
    assert "abc123, with uncommitted changes" in found["From which source tree?"]
    report.render(again)
    page = again.report_file("html").read_text()
    assert "<code>fledge run tiny --model.depth 3</code>" in page
    assert "all is well" in again.report_file("md").read_text().partition("## Scores")[0]
    clean = resolved_with(run, git={"revision": "abc123", "changed": False})
    assert "no uncommitted change" in told(clean)["From which source tree?"]
    assert "not a clone" in told(resolved_with(run, git=None))["From which source tree?"]


def test_what_the_recipe_expects_and_what_was_changed(run: Run) -> None:
    # no origin: this version's recipe, for the run asked for exactly what it says
    assert "nothing worth measuring" in (expected_of_recipe(run)[0] or "")
    run.resolved["recipe"]["model"]["depth"] = 3
    assert expected_of_recipe(run) == (None, [])
    run.resolved["origin"] = {"expected": "x", "overrides": ["model.depth: 2 -> 3"]}
    assert "changed model.depth: 2 -> 3" in told(run)["Compared with what?"]


@pytest.mark.parametrize("name", sorted(config.builtin_recipes()))
def test_every_recipe_says_what_it_expects(name: str) -> None:
    text = config.builtin_recipes()[name]
    expected = config.expected_of(text)
    assert expected and "#" not in expected.partition("(karpathy")[0]
    entry = next(line for line in text.splitlines() if line.startswith("#   expected"))
    assert expected.startswith(entry.partition("expected")[2].strip())
    assert config.recipe_text(name) == text


def test_a_table_in_a_header_keeps_its_columns() -> None:
    text = "# r: x\n#\n#   cost       nothing\n#   expected   so:\n"
    text += "#                A    B\n#              c .1   .2\n#\n# More.\n[model]\n"
    assert config.expected_of(text) == "so:\n  A    B\nc .1   .2"
    assert config.expected_of("# no entry\n[model]\n") is None


# -- what went wrong -------------------------------------------------------------------------------


def test_skipped_batches_and_roll_backs_are_told(run: Run) -> None:
    with MetricsLog(run.metrics_file("base")) as metrics:
        for step in (41, 42, 43):
            metrics.append(
                {"step": step, "loss": 9.0, "tokens": 2048, "seconds": 0.1, "skipped": 1}
            )
        metrics.append({"step": 44, "loss": 9, "tokens": 8, "skipped": 1, "rolled_back_to": 40})
        empty = {"loss": 0.0, "tokens": 2048, "trained_tokens": 0, "skipped": 1}
        metrics.append({"step": 45} | empty)
    found = told(run)["What went wrong?"]
    assert "base: 1 of 45 batches had nothing to learn" in found
    assert "base: 4 of 45 batches were skipped" in found and "(step 41, 42, 43, 44)" in found
    assert "base went back to earlier weights: at step 44 to 40." in found


def test_interruptions_failures_and_sudden_ends_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer", status="interrupted")
        do_stage(run, "tokenizer")
        parts = run.stage_parts("base", data={"world": "village"})
        run.begin_stage("base", parts)
        run.log_file("base").write_text("step 4\n")
        write_training(run, "base", steps=5)
        found = told(run)
        assert (
            "tokenizer was interrupted and taken up again: 2 attempts." in found["What went wrong?"]
        )
        assert "base is running just now" in found["What went wrong?"]
        assert "so far" in found["How long did it take?"]
        monkeypatch.setattr(Run, "is_worked_on", lambda self: False)
        assert "base stopped without a word" in told(run)["What went wrong?"]
        assert [t.log for t in troubles(run, report.gather(run))] == ["", "step 4"]
        run.end_stage("base", "failed", seconds=3.0, error="RuntimeError: no")
        assert "base failed after 3 s: RuntimeError: no" in told(run)["What went wrong?"]


def test_missing_exams_are_told(run: Run) -> None:
    path = run.task_file("sft", "chatcore")
    write_exam(run, "sft", "chatcore", 0.3)
    table = json.loads(path.read_text()) | {"unit": "centred accuracy"}
    table["note"] = "mean of 4 of 5 tasks; missing: humaneval"
    path.write_text(json.dumps(table))
    run.resolved["values"]["evaluate.tasks"] = ["world_facts", "world_spell"]
    found = told(run)["What went wrong?"]
    assert "Not examined, though asked for: world_spell." in found
    assert "Missing from a mean: humaneval." in found


# -- shares and settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.015, "1.5 %"), (0.01499, "1.5 %"), (0.0149, "1.5 %"), (0.025, "2.5 %"), (0.25, "25 %"),
     (1 / 3, "33.3 %"), (0.0, "0 %"), (1.0, "100 %"), (0.0004, "0 %")],
)  # fmt: skip
def test_shares_are_shown_alike(share: float, text: str) -> None:
    assert format_percent(share) == text


def test_a_share_of_a_mixture_has_one_form_in_the_report(run: Run) -> None:
    run.mixture_file("mid").write_text(json.dumps({"math": 0.015}))  # before 0.2
    row = {"weight": 0.01499, "token_share": 0.0151, "rows": None, "tokens": 5.0, "trained": 2.0}
    run.mixture_file("sft").write_text(json.dumps({"math": row | {"epochs": None}}))
    report.render(run)
    text = run.report_file("md").read_text()
    assert "Kinds of conversations in mid: math 1.5 %." in text
    assert "| math | 1.5 % | 1.5 % | endless |" in text


def test_what_was_asked_for_has_no_defaults(tmp_path: Path) -> None:
    recipe = config.parse_recipe("[model]\ndepth = 2\n[base]\nseed = 5\n", where="test")
    with Run.open(tmp_path / "r", "r", recipe, plan_of(recipe)) as run:
        report.render(run)
        text = run.report_file("md").read_text()
    asked = text.partition("### What was asked for")[2].partition("###")[0]
    assert "depth = 2" in asked and "seed = 5" in asked
    for default in ("val_fraction", "world", "pattern", "[mid]", "[data]"):
        assert default not in asked.partition("```")[2]
    assert "further keys have fledge's default" in asked


def test_every_stage_and_measure_is_explained(run: Run) -> None:
    report.render(run)
    text = run.report_file("md").read_text().partition("## What the words mean")[2]
    for word in ("base", "mid", "sft", "rl", "bpb", "MFU", "CORE", "ChatCORE"):
        assert f"\n| {word} | " in text
    assert len({word for word, _ in WORDS}) == len(WORDS)


def test_notes_of_every_stage_stand_once(run: Run) -> None:
    for stage in ("base", "mid"):
        record = json.loads(run.stage_file(stage).read_text())
        run.stage_file(stage).write_text(json.dumps(record | {"notes": ["mmlu is not there"]}))
    report.render(run)
    text = run.report_file("md").read_text()
    assert text.count("mmlu is not there") == 1 and "| in base and mid | mmlu" in text


def test_two_runs_answer_side_by_side(run: Run, tmp_path: Path) -> None:
    text = report.compare(run, finished_run(tmp_path / "other"))
    assert "| question | A | B |" in text and "| What went wrong? | Nothing" in text
