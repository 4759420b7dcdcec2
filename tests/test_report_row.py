"""fledge.report_row: a finished run as a line of the leaderboard, made of its own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge import cli, report, report_row
from fledge.errors import UserError
from tests.helpers_run import do_stage, finished_run, open_run


def test_a_row_says_what_the_files_of_the_run_say(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r")
    cells = report_row.row(run, report.gather(run)).strip("|\n ").split(" | ")
    found = dict(zip(report_row.COLUMNS, cells, strict=True))
    last = json.loads(run.metrics_file("base").read_text().splitlines()[-1])
    assert found["bpb"] == f"{last['bpb']:.4f}"
    assert f"depth {run.model.num_hidden_layers}" in found["network"]
    assert found["seed"] == "0" and "world" in found["text"]
    assert report_row.header().count("|") == 2 * (len(report_row.COLUMNS) + 1)


def test_the_command_prints_rows_and_leaves_the_report_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "r")
    assert cli.main(["report", str(run.path), str(run.path), "--row"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2] == lines[3]
    assert not run.report_file("md").exists()


def test_an_unfinished_base_has_no_row(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        do_stage(run, "base", status="interrupted")
        with pytest.raises(UserError, match="has no row yet"):
            report_row.row(run, report.gather(run))
