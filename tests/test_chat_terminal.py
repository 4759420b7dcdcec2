"""The terminal chat: reading, commands, and a real terminal (tmux) with a scripted engine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fledge.chat_terminal import COLOURED, Colours, Reader, colours_of, handle
from fledge.errors import UserError
from fledge.tokenizer import Tokenizer
from tests.test_chat import a_chat

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "terminal_driver.py"


def reader_of(*lines: str) -> Reader:
    source = iter(lines)

    def ask(prompt: str) -> str:
        try:
            return next(source)
        except StopIteration:
            raise EOFError from None

    return Reader(terminal=False, colours=Colours(), ask=ask)


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["one", "two"], ["one", "two"]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (["a path C:\\\\", "b"], ["a path C:\\\\", "b"]),
        (['"""', "x = 1", "", "y", '"""', "after"], ["x = 1\n\ny", "after"]),
        (['"""one line"""', "b"], ["one line", "b"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""', "never closed"], ["never closed"]),
        (["cut off\\"], ["cut off"]),
    ],
)
def test_messages_of_many_lines(lines: list[str], messages: list[str]) -> None:
    reader = reader_of(*lines)
    assert [reader.read() for _ in messages] == messages
    with pytest.raises(EOFError):
        reader.read()


def test_what_was_saved_can_be_loaded(tok: Tokenizer, tmp_path: Path, capsys) -> None:
    made, _ = a_chat(tok, "first", "second", "third")
    for line in ("/temp 0.5", "/seed 9", "/system Be brief.", "Hello", f"/save {tmp_path}/t.json"):
        handle(made, line)
    other, _ = a_chat(tok, "again")
    handle(other, f"/load {tmp_path}/t.json")
    assert other.messages == made.messages and other.settings == made.settings
    assert "1 question\n" in capsys.readouterr().out
    handle(other, "And?")
    assert "Hello" in tok.decode(other.engine.prompts[-1])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "boss", "content": "x"}]}',
        '{"messages": [{"content": "x"}]}', '{"messages": [{"role": "user", "content": [3]}]}',
        '{"messages": [], "settings": {"temperature": "hot"}}',
        '{"messages": [], "settings": {"seed": 1.5}}', '{"messages": [], "settings": [1]}',
        '{"messages": [], "settings": {"max_tokens": 0}}',
        '{"messages": [], "settings": {"system": 3}}',
    ],
)  # fmt: skip
def test_what_is_no_saved_conversation_changes_nothing(tok, tmp_path, content: str) -> None:
    made, _ = a_chat(tok, "first")
    handle(made, "Hello")
    before = (list(made.messages), made.settings)
    path = tmp_path / "bad.json"
    path.write_text(content)
    for line in (f"/load {path}", f"/load {tmp_path}/missing.json", f"/load {tmp_path}", "/load"):
        with pytest.raises(UserError):
            handle(made, line)
    assert (made.messages, made.settings) == before


def test_a_hundred_turns_past_the_window(tok: Tokenizer, capsys) -> None:
    made, screen = a_chat(tok, "fine \U0001f600 \u4f60\u597d", context=160)
    for i in range(100):
        handle(made, f"question number {i} \U0001f468\u200d\U0001f469")
        assert len(made.engine.prompts[-1]) <= 160 - 160 // 3  # type: ignore[attr-defined]
    assert screen.text.count("left out") == 1 and len(made.messages) == 200
    handle(made, "/stats")
    assert f"its oldest {made.left_out} messages are left out" in capsys.readouterr().out
    assert made.left_out > 150


def test_colours_only_where_they_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, *, terminal: bool) -> None:
            self.isatty = lambda: terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colours_of(Stream(terminal=True)) == COLOURED
    assert colours_of(Stream(terminal=False)) == Colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert colours_of(Stream(terminal=True)) == Colours()


def test_the_list_of_commands_is_whole() -> None:
    from fledge.chat_terminal import _COMMANDS, HELP

    for name in [*_COMMANDS, "/quit"]:
        assert f"\n{name} " in f"\n{HELP}"
    assert max(map(len, HELP.splitlines())) <= 100


# -- pipes ---------------------------------------------------------------------------------------


def run_driver(text: str, *, context: int = 2000) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python"), "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", str(DRIVER), str(context)],
        input=text, capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


def test_pipes_in_and_out() -> None:
    """Answers only, no prompt, no colour; errors go elsewhere and do not end the talk."""
    done = run_driver('hello\n/nonsense\n"""\ntwo\nlines\n"""\n\u4f60\u597d \U0001f600\ntool\n')
    assert done.returncode == 0
    assert done.stdout == (
        "<hello>\n<two\nlines>\n<\u4f60\u597d \U0001f600>\n[python: 6*7 -> 42]\n"
    )
    assert "there is no command /nonsense" in done.stderr and "\x1b" not in done.stderr


# -- a real terminal -----------------------------------------------------------------------------


class Terminal:
    """A tmux session with the driver in it."""

    def __init__(
        self, folder: Path, *, context: int, columns: int = 80, **environment: str
    ) -> None:
        self.socket = str(folder / "tmux")
        given = {"PYTHONPATH": str(ROOT / "python"), "TERM": "tmux-256color", "LC_ALL": "C.UTF-8",
                 "NO_COLOR": "", **environment}  # fmt: skip
        words = [
            "env",
            *(f"{k}={v}" for k, v in given.items()),
            sys.executable,
            str(DRIVER),
            str(context),
        ]
        command = f"{shlex.join(words)}; echo ended with $?; read"
        self.tmux(
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-s",
            "t",
            "-x",
            str(columns),
            "-y",
            "40",
            command,
        )
        self.tmux("set-option", "-g", "history-limit", "20000")

    def tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-S", self.socket, *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout

    def type(self, text: str, *, enter: bool = True) -> None:
        self.tmux("send-keys", "-t", "t", "-l", "--", text)
        if enter:
            self.key("Enter")

    def key(self, name: str) -> None:
        self.tmux("send-keys", "-t", "t", name)

    def screen(self, *, colours: bool = False) -> str:
        more = ["-e"] if colours else []
        return self.tmux("capture-pane", "-p", "-J", "-S", "-", "-t", "t", *more)

    def until(self, text: str, seconds: float = 20) -> str:
        end = time.monotonic() + seconds
        while text not in (shown := self.screen()):
            assert time.monotonic() < end, f"{text!r} did not come:\n{shown}"
        return shown


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("there is no tmux")
    made = Terminal(tmp_path, context=400)
    try:
        made.until("you:")
        yield made
    finally:
        subprocess.run(["tmux", "-S", made.socket, "kill-server"], check=False, capture_output=True)


def test_a_conversation_in_a_terminal(terminal: Terminal) -> None:
    assert "it makes things up" in terminal.screen()
    terminal.type("hello \u4f60\u597d \U0001f600")
    terminal.until("model: <hello \u4f60\u597d \U0001f600>")
    terminal.key("Up")  # history
    terminal.key("Enter")
    end = time.monotonic() + 20
    while terminal.screen().count("model: <hello") < 2:
        assert time.monotonic() < end, terminal.screen()
    terminal.type("/stats")
    terminal.until("of 400 tokens")
    coloured = terminal.screen(colours=True)
    assert "\x1b[1m\x1b[36myou:" in coloured or "\x1b[1;36myou:" in coloured
    terminal.key("C-d")
    terminal.until("ended with 0")


def test_a_paste_of_many_lines_is_one_message(terminal: Terminal, tmp_path: Path) -> None:
    pasted = tmp_path / "pasted"
    pasted.write_text("def f():\n    return 1\n\nprint(f())")
    terminal.tmux("load-buffer", str(pasted))
    terminal.tmux("paste-buffer", "-p", "-t", "t")
    terminal.until("print(f())")
    assert "model:" not in terminal.screen()
    terminal.key("Enter")
    terminal.until("model: <def f():\n    return 1\n\nprint(f())>")


def test_ctrl_c_stops_the_answer_and_only_that(terminal: Terminal) -> None:
    terminal.type("slow 500")
    terminal.until("word3 ")
    terminal.key("C-c")
    terminal.until("(stopped)")
    assert "word400" not in terminal.screen()
    terminal.type("half a mess", enter=False)
    terminal.until("half a mess")
    terminal.key("C-c")
    terminal.until("(/quit or Ctrl-D leaves)")
    terminal.type("still here")
    terminal.until("model: <still here>")
    terminal.type("/quit")
    terminal.until("ended with 0")


def test_a_terminal_that_changes_its_size(terminal: Terminal) -> None:
    terminal.type("slow 60")
    terminal.until("word3 ")
    terminal.tmux("resize-window", "-t", "t", "-x", "40", "-y", "20")
    terminal.until("word59")
    terminal.type("a line that is longer than forty columns and so wraps")
    terminal.until("<a line that is longer than forty columns and so wraps>")


def test_a_hundred_turns_in_a_terminal(terminal: Terminal) -> None:
    for i in range(100):
        terminal.type(f"turn {i} \U0001f468\u200d\U0001f469 \ud55c\uad6d")
    shown = terminal.until("model: <turn 99")
    assert shown.count("left out)") == 1
    assert "Traceback" not in shown and shown.count("model:") == 100
