"""Checkpoints written while training goes on hold what they held when they were asked for."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from fledge import cli, files
from fledge.config import STAGES
from fledge.errors import UserError
from fledge.model import Transformer
from fledge.train import checkpoint
from fledge.train.saving import Saver
from tests.faults.killing import kill_at_rename, names_of
from tests.helpers_mini import artefacts, assert_three_parts, differences, fledge, write_recipe

pytestmark = pytest.mark.timeout(900)  # seconds of work, but the machine may be busy
BEHIND = ("--hardware.async-checkpoints", "True", "--until", "mid")


def run(recipe: Path, out: Path, *words: object) -> int:
    return cli.main([*map(str, ("run", recipe, "--out", out, *words))])


def changed(left: Path, right: Path) -> list[str]:
    """Files of the stages that differ; the other files say how checkpoints were written."""
    found = differences(artefacts(left), artefacts(right))
    return [name for name in found if name.partition("/")[0] in STAGES]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run whose checkpoints are written at once."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(recipe, out, "--until", "mid") == 0
    return out


def test_what_is_written_late_is_not_what_came_later(
    whole: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every checkpoint is held back until a later step has been made, or somebody waits for it."""
    later = threading.Event()
    write, pass_, wait = checkpoint.write, Transformer.add_gradients, Saver.wait
    overtaken = []

    def held_back(*args, **rest):
        if threading.current_thread() is not threading.main_thread():
            assert later.wait(600)
            overtaken.append(1)
        return write(*args, **rest)

    def stepping(self, *args):
        found = pass_(self, *args)
        later.set()
        return found

    def waiting(self):
        later.set()
        wait(self)
        later.clear()

    monkeypatch.setattr(checkpoint, "write", held_back)
    monkeypatch.setattr(Transformer, "add_gradients", stepping)
    monkeypatch.setattr(Saver, "wait", waiting)
    assert run(recipe, tmp_path / "run", *BEHIND) == 0
    assert len(overtaken) == 7 + 4  # steps 3 to 18 and 20 of base; 2, 4, 6, 8 of mid
    assert changed(whole, tmp_path / "run") == []


def test_a_request_to_stop_waits_for_the_disk(
    whole: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_, count = Transformer.add_gradients, iter(range(10**9))

    def stopping(self, *args):
        if next(count) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return pass_(self, *args)

    monkeypatch.setattr(Transformer, "add_gradients", stopping)
    out = tmp_path / "run"
    assert run(recipe, out, *BEHIND) == 75
    monkeypatch.undo()
    assert (out / "base" / "LATEST").read_text().strip() == "step_000011"
    assert names_of(r"\.tmp$", out) == []
    assert run(recipe, out, *BEHIND) == 0
    assert changed(whole, out) == []


def test_kill_9_while_writing_behind(whole: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("run", recipe, "--out", out, *BEHIND)
    for pattern, when in ((r"step_000006\.tmp -> ", "before"), (r"step_000015\.tmp -> ", "after")):
        assert kill_at_rename(pattern, when, *words) == -signal.SIGKILL
        latest = (out / "base" / "LATEST").read_text().strip()
        assert latest in ("step_000003", "step_000012")
        checkpoint.verify(out / "base" / "checkpoints" / latest)
    done = fledge(*words)
    assert done.returncode == 0, done.stderr
    assert changed(whole, out) == []


def test_a_disk_that_fills_up_behind_is_told_in_words(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Told at the next save or at the end; the checkpoint before is kept, and the run goes on."""
    rename = os.rename

    def full(source, target, **rest):
        if "step_000009" in str(target):
            raise OSError(28, "No space left on device")
        return rename(source, target, **rest)

    monkeypatch.setattr(os, "rename", full)
    out = tmp_path / "run"
    assert run(recipe, out, *BEHIND) == 1
    said = capsys.readouterr().err
    assert_three_parts(said)
    assert "the disk is full" in said
    assert (out / "base" / "LATEST").read_text().strip() == "step_000006"
    assert json.loads((out / "base" / "stage.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert run(recipe, out, *BEHIND) == 0


def test_a_disk_that_is_known_to_be_too_small_is_told_at_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def small(folder: Path, needed: int, **rest: object) -> None:
        if "checkpoints" in str(folder):
            assert threading.current_thread() is threading.main_thread()
            raise UserError("not enough disk space", "0 bytes are free", "free some space")

    monkeypatch.setattr(files, "require_free_bytes", small)
    assert run(recipe, tmp_path / "run", *BEHIND) == 1
    assert "not enough disk space" in capsys.readouterr().err


def test_two_ranks_stop_together_while_the_leader_writes(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = fledge("run", recipe, "--out", out, *BEHIND, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    for stage, last in (("base", "step_000020"), ("mid", "step_000008")):
        assert (out / stage / "LATEST").read_text().strip() == last
        checkpoint.verify(out / stage / "checkpoints" / last)
