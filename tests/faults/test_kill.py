"""kill -9 and SIGTERM: whatever the moment, going on ends in the files of an uninterrupted run.

benchmarks/kill_resume.py does the same with more kills and any recipe.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.killing import kill_at_rename, kill_when, names_of, rows
from tests.helpers_mini import ROOT, artefacts, differences, fledge, write_recipe

pytestmark = pytest.mark.timeout(1800)  # under a minute of work, but the machine may be busy


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finished = fledge("run", recipe, "--out", out)
    assert finished.returncode == 0, finished.stderr
    return out


def attempts(run: Path, stage: str) -> int:
    return json.loads((run / stage / "stage.json").read_text())["attempts"]


def test_kill_9_at_random_moments(whole: Path, recipe: Path, tmp_path: Path) -> None:
    out, dice = tmp_path / "run", random.Random(2)
    words = ("run", recipe, "--out", out)
    step, later = dice.randint(1, 20), dice.choice(["mid", "sft", "rl"])
    killed = [
        kill_when(lambda: rows(out / "base" / "metrics.jsonl") >= step, *words),
        kill_when(lambda: rows(out / later / "metrics.jsonl") >= 1, *words),
        kill_when((out / "evaluate" / "sft" / "world_mc.json").is_file, *words),
    ]
    # on a busy machine the run may be over before its killer wakes up; None says so
    assert set(killed) <= {-signal.SIGKILL, None} and killed.count(-signal.SIGKILL) >= 2
    finished = fledge(*words)
    assert finished.returncode == 0, finished.stderr
    assert differences(artefacts(whole), artefacts(out)) == []


def test_kill_9_inside_a_save(whole: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("run", recipe, "--out", out)
    base = "base/checkpoints/step_0000"
    moments = [
        # the description of the run is half there
        (r"resolved\.json\.tmp -> ", "after"),
        # the checkpoint is whole under its temporary name
        (rf"{base}03\.tmp -> ", "before"),
        # it has its name, and LATEST does not say so yet
        (rf"{base}06\.tmp -> ", "after"),
        # the last one is the latest, and the oldest is neither here nor gone
        (rf"{base}15 -> .*tmp", "after"),
        # the exam's records are there, its result is not
        (r"world_math\.json\.tmp -> ", "before"),
    ]
    for pattern, when in moments:
        assert kill_at_rename(pattern, when, *words) == -signal.SIGKILL, pattern
    finished = fledge(*words)
    assert finished.returncode == 0, finished.stderr
    assert names_of(r"\.tmp$", out) == []
    assert attempts(out, "base") == 4 and attempts(out, "evaluate") == 2
    assert differences(artefacts(whole), artefacts(out)) == []


def test_sigterm_and_ctrl_c_save_leave_with_75_and_go_on(
    whole: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("run", recipe, "--out", out)
    for stage, step, number in (("base", 19, signal.SIGTERM), ("mid", 3, signal.SIGINT)):
        metrics = out / stage / "metrics.jsonl"
        code = kill_when(lambda m=metrics, s=step: rows(m) >= s, *words, number=number)
        if code is None:
            continue  # a busy machine: it was over before
        assert code == 75
        record = json.loads((out / stage / "stage.json").read_text())
        if record["status"] == "interrupted":  # not if it was quicker than the signal
            saved = int((out / stage / "LATEST").read_text().strip().removeprefix("step_"))
            assert saved == rows(metrics) >= step
        assert names_of(r"\.tmp$", out) == []
    finished = fledge(*words)
    assert finished.returncode == 0, finished.stderr
    assert differences(artefacts(whole), artefacts(out)) == []


def test_the_checkpoint_before_loads_after_every_kill_in_a_save(tmp_path: Path) -> None:
    """Six of the fifty kills of `benchmarks/kill_resume.py --saving 50`, by that script."""
    page = tmp_path / "page.md"
    script = ROOT / "benchmarks" / "kill_resume.py"
    words = ("--saving", "6", "--steps", "24", "--seed", "1", "--results", page)
    done = subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 6 times inside a save (3 of them" in page.read_text()
    assert "in **0 files**" in page.read_text()
