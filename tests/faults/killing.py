"""Killing a run: at a moment that its files show, or exactly at one renaming of a file.

The second way starts fledge with `os.rename` and `os.replace` watched, so that a kill hits the
inside of a save; the product itself has no hook for it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fledge import cli
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.train import checkpoint
from tests.helpers_mini import command, environment

PATIENCE_SECONDS = 600  # the machine may be busy; the work itself takes seconds

WATCHED = """
import os, re, signal, sys
from fledge import cli

pattern, when = sys.argv[1], sys.argv[2]

def watched(original):
    def wrapper(source, target, **rest):
        hit = re.search(pattern, f"{source} -> {target}")
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target, **rest)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
    return wrapper

os.rename, os.replace = watched(os.rename), watched(os.replace)
sys.exit(cli.main(sys.argv[3:]))
"""


def kill_when(seen: Callable[[], bool], *words: object, number: int = signal.SIGKILL) -> int | None:
    """Start `fledge WORDS`, send the signal as soon as `seen()`; returns the exit code.

    None: the run came to its end before.
    """
    process = subprocess.Popen(
        command(*words),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while not seen():
            if process.poll() is not None:
                return None
            assert time.monotonic() < deadline, f"nothing seen of fledge {words}"
            time.sleep(0.001)
        process.send_signal(number)
        return process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()


def kill_at_rename(pattern: str, when: str, *words: object) -> int:
    """Run `fledge WORDS` until a renaming "SOURCE -> TARGET" matches, and kill it there."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, pattern, when, *map(str, words)],
        env=environment(),
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return done.returncode


def rows(path: Path) -> int:
    """Lines of a file that may not exist yet."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def names_of(pattern: str, folder: Path) -> list[str]:
    """Files below a folder whose name matches; for asserting that no half of one is left."""
    return [p.name for p in folder.rglob("*") if re.search(pattern, p.name)]


def kill_in_save(checkpoints: Path, nth: int, delay: float, *words: object) -> str | None:
    """Start `fledge WORDS` and kill it `delay` seconds after the nth temporary folder has come.

    Returns the folder's name if the run died inside the save, "" if between two, None if it was
    over before. The run is a fork of this process, which has imported everything: a fresh one would
    spend most of its time on that. So this process must have used no threads of torch's.
    """
    before = {path.name for path in checkpoints.glob("*.tmp")}  # what the kill before left
    process = forked(_quiet_run, *words)
    come: list[str] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        while len(come) < nth:
            now = {path.name for path in checkpoints.glob("*.tmp")}
            come += sorted(now - before)
            before = now
            if process.exitcode is not None:
                return None
            assert time.monotonic() < deadline, f"no save of fledge {words}"
        until = time.monotonic() + delay
        while time.monotonic() < until:
            pass  # a sleep is as coarse as a save is long
    finally:
        process.kill()
        process.join(PATIENCE_SECONDS)
    if process.exitcode != -signal.SIGKILL:
        return None
    left = sorted(path.name for path in checkpoints.glob("*.tmp"))
    return left[0] if left else ""


def forked(function: Callable[..., int], *arguments: object) -> multiprocessing.Process:
    """A started copy of this process that calls the function and ends with what it returns."""
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=_end_with, args=(function, arguments))
    process.start()
    return process


def _end_with(function: Callable[..., int], arguments: tuple[object, ...]) -> None:
    sys.exit(function(*arguments))


def _quiet_run(*words: object) -> int:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        return cli.main([*map(str, words)])


def loads(run: Path, stage: str) -> int:
    """The step of the checkpoint that LATEST names, after all of it was verified and loaded."""
    latest = run / stage / "checkpoints" / (run / stage / "LATEST").read_text().strip()
    checkpoint.verify(latest)
    model = Transformer.load(latest)
    state = checkpoint.read_state(latest)
    assert checkpoint.read_optimizers(
        latest, Optimizers(model, LearningRates(0.1, 0.1, 0.1, 0.1, 0))
    )
    assert latest.name == f"step_{state['step']:06d}"
    return state["step"]
