"""A recording of the terminal chat: docs/page/chat.cast (asciinema's format 2) and chat.txt.

    python tools/record_chat.py [--run runs/quickstart]

Drives `fledge chat` through a pseudo terminal by the keys that a person would press, waits for each
answer, and writes what came out, with its times, to the cast, and the text to chat.txt. Run by a
person when the chat changes; needs a trained run and nothing else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINES = 90, 30
KEY_SECONDS = 0.04  # between two keys, so that a viewer can follow
WAIT_SECONDS = 60.0
READY = "you:"
SCRIPT = (  # keys; a \n is Enter
    "Which is the capital of Italy?\n",
    'Spell "boot".\n',
    "Ravi has 873 balloons. Ravi buys 64 more. How many balloons does Ravi have now?\n",
    "/stats\n",
    "/temp 0.7\n",
    "/retry\n",
    "Tell me\\\nabout Brazil.\n",
    "/quit\n",
)


def main(words: list[str] | None = None) -> int:
    """Records; returns the exit code of the chat."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "page")
    args = parser.parse_args(words)
    pid, terminal = pty.fork()
    if pid == 0:
        environment = os.environ | {"TERM": "xterm-256color", "NO_COLOR": ""}
        os.execve(
            sys.executable, [sys.executable, "-m", "fledge", "chat", str(args.run)], environment
        )
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    recorder = Recorder(terminal)
    recorder.until(READY, 1)
    for turn, keys in enumerate(SCRIPT, start=2):
        for key in keys:
            os.write(terminal, b"\r" if key == "\n" else key.encode())
            recorder.read(KEY_SECONDS)
        if keys != SCRIPT[-1]:
            recorder.until(READY, turn)
    recorder.read(WAIT_SECONDS)
    _, status = os.waitpid(pid, 0)
    recorder.write(args.out)
    return os.waitstatus_to_exitcode(status)


class Recorder:
    """What a terminal shows, piece by piece."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self._began: float | None = None
        self.events: list[tuple[float, str]] = []
        self._rest = b""

    @property
    def text(self) -> str:
        return "".join(data for _, data in self.events)

    def read(self, seconds: float) -> bool:
        """Takes what comes within `seconds`; False when the program has closed the terminal."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._terminal], [], [], left)[0]:
                return True
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # Linux says so when the other side is gone
                return False
            if not data:
                return False
            self._take(data)
        return True

    def until(self, text: str, times: int) -> None:
        """Reads until `text` has come so many times."""
        end = time.monotonic() + WAIT_SECONDS
        while self.text.count(text) < times:
            if time.monotonic() > end or not self.read(0.2):
                raise SystemExit(f"{text!r} did not come {times} times:\n{self.text}")

    def _take(self, data: bytes) -> None:
        data = self._rest + data
        text = data.decode("utf-8", "ignore")  # an unfinished character waits for its rest
        self._rest = data[len(text.encode()) :]
        now = time.monotonic()
        self._began = self._began if self._began is not None else now  # loading is not shown
        self.events.append((round(now - self._began, 3), text))

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        head = {"version": 2, "width": COLUMNS, "height": LINES, "title": "fledge chat"}
        lines = [json.dumps(head), *(json.dumps([when, "o", data]) for when, data in self.events)]
        (folder / "chat.cast").write_text("\n".join(lines) + "\n", encoding="utf-8")
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text).replace("\r", "")
        (folder / "chat.txt").write_text(plain.strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
