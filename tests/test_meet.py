"""tools/meet.sh, the end of `make quickstart`: what it starts, and where."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
from pathlib import Path

import pytest

from tests.helpers_run import finished_run, open_run, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def meet(run: Path, tmp_path: Path, *, terminal: bool, **environment: str) -> list[str]:
    """The words with which meet.sh ended in `fledge`."""
    record = tmp_path / "words"
    program = tmp_path / "fledge"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {record}\n')
    program.chmod(0o755)
    given = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    }
    given |= {"FLEDGE": str(program), **environment}
    words = [str(ROOT / "tools" / "meet.sh"), str(run)]
    if terminal:
        ours, theirs = pty.openpty()
        subprocess.run(words, env=given, stdin=theirs, stdout=theirs, timeout=30, check=True)
        os.close(theirs)
        os.close(ours)
    else:
        subprocess.run(words, env=given, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       timeout=30, check=True)  # fmt: skip
    return record.read_text().splitlines()


def test_without_a_terminal_it_asks_and_ends(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r").path
    words = meet(run, tmp_path, terminal=False, BROWSER="firefox")
    assert words == ["chat", str(run), "--sample-conversation"]


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="macOS always has a browser")
def test_without_a_browser_it_talks_in_the_terminal(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r").path
    assert meet(run, tmp_path, terminal=True) == ["chat", str(run)]


def test_with_a_browser_it_serves_the_page_and_what_to_compare(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r").path
    words = meet(run, tmp_path, terminal=True, DISPLAY=":0")
    assert words[:3] == ["serve", "--quiet", "--port"]
    assert words[4:] == [str(run), f"{run}/sft", f"{run}/base"]
    with open_run(tmp_path / "short") as short:
        write_checkpoint(short, "base", 5)
        write_checkpoint(short, "sft", 5)
    words = meet(short.path, tmp_path, terminal=True, DISPLAY=":0")
    assert words[4:] == [str(short.path), f"{short.path}/base"]


def test_a_taken_port_is_no_obstacle(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "r").path
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", 8000))
            holder.listen()
        except OSError:
            pass  # somebody else's already: as good
        assert meet(run, tmp_path, terminal=True, DISPLAY=":0")[3] == "0"
