"""fledge.chat with a stand-in engine: streaming, the window, commands, one-shot and samples."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge import chat, chat_terminal
from fledge.chat import Chat, Settings, StreamText
from fledge.chat_terminal import handle, talk
from fledge.errors import UserError
from fledge.run import find_checkpoint
from fledge.tokenizer import Tokenizer
from tests.helpers_run import finished_run, open_run, write_checkpoint


@dataclass
class FakeEngine:
    """Answers every prompt with the next of `answers`; remembers what it was asked."""

    answers: list[list[int]]
    interrupt_after: int | None = None
    prompts: list[list[int]] = field(default_factory=list)
    settings: list[Settings] = field(default_factory=list)

    def stream(self, prompt: list[int], params: Any, tools: Any = None) -> Iterator[int]:
        self.prompts.append(prompt)
        self.settings.append(params)
        for place, token in enumerate(self.answers[min(len(self.prompts), len(self.answers)) - 1]):
            if place == self.interrupt_after:
                raise KeyboardInterrupt
            yield token


class Screen(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)

    @property
    def text(self) -> str:
        return "".join(self)


def a_chat(tok: Tokenizer, *answers: str, context: int = 400, **more: Any) -> tuple[Chat, Screen]:
    ids = [[*tok.encode(answer), tok.eos_id] for answer in answers]
    screen = Screen()
    made = Chat(
        FakeEngine(ids, **more),
        tok,
        context=context,
        settings=Settings(max_tokens=100),
        make_params=lambda settings: settings,
        write=screen,
    )
    return made, screen


def test_an_answer_streams_and_is_remembered(tok: Tokenizer) -> None:
    made, screen = a_chat(tok, "Héllo 😀 world")
    reply = made.ask("Hi")
    assert screen.text == "Héllo 😀 world\n"
    assert reply.parts == [{"type": "text", "text": "Héllo 😀 world"}]
    assert [m["role"] for m in made.messages] == ["user", "assistant"]
    made.ask("And?")
    second = tok.decode(made.engine.prompts[1])  # type: ignore[attr-defined]
    assert "Hi" in second and "Héllo" in second and "And?" in second


@given(text=st.text())
def test_streaming_shows_whole_characters_only(tok: Tokenizer, text: str) -> None:
    """Byte by byte, each write is valid text and together they are what was meant."""
    screen = Screen()
    stream = StreamText(tok, screen)
    for byte in text.encode():  # the ids below 256 are the bytes
        stream.feed(byte)
    stream.finish()
    safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    assert screen.text == safe


def test_a_broken_character_becomes_a_mark(tok: Tokenizer) -> None:
    screen = Screen()
    stream = StreamText(tok, screen)
    first = next(i for i in range(tok.vocab_size) if tok.token_bytes(i) == b"\xf0")
    stream.feed(first)
    assert screen.text == ""
    stream.finish()
    assert screen.text == "\ufffd"


def test_escape_codes_do_not_reach_the_terminal(tok: Tokenizer) -> None:
    made, screen = a_chat(tok, "a\x1b[31mred\x07")
    made.ask("Hi")
    assert "\x1b" not in screen.text and "\x07" not in screen.text


def test_tool_calls_are_shown_in_brackets(tok: Tokenizer) -> None:
    special = tok.special_tokens
    ids = [special["<|python_start|>"], *tok.encode("12*7"), special["<|python_end|>"]]
    ids += [special["<|output_start|>"], *tok.encode("84"), special["<|output_end|>"]]
    ids += [*tok.encode(" It is 84."), tok.eos_id]
    screen = Screen()
    made = Chat(
        FakeEngine([ids]),
        tok,
        context=400,
        settings=Settings(),
        make_params=lambda settings: settings,
        write=screen,
    )
    reply = made.ask("What is 12*7?")
    assert screen.text == "[python: 12*7 -> 84] It is 84.\n"
    assert [part["type"] for part in reply.parts] == ["python", "output", "text"]


def test_a_space_stands_behind_a_tool_call(tok: Tokenizer) -> None:
    """Models write the text right behind the output; a reader wants a gap, but only one."""
    special = tok.special_tokens
    for text, shown in (
        ("It is 84.", "[ -> 84] It is 84."),
        ("\nSo", "[ -> 84]\nSo"),
        ("", "[ -> 84]"),
    ):
        screen = Screen()
        stream = StreamText(tok, screen)
        ids = [special["<|output_start|>"], *tok.encode("84"), special["<|output_end|>"]]
        for token in [*ids, *tok.encode(text)]:
            stream.feed(token)
        stream.finish()
        assert f"[{screen.text}" == shown


def test_ctrl_c_stops_the_answer_not_the_talk(tok: Tokenizer) -> None:
    made, screen = a_chat(tok, "one two three four five six", interrupt_after=2)
    reply = made.ask("Count")
    assert reply.stopped and screen.text.endswith("(stopped)\n")
    assert made.messages[-1]["role"] == "assistant"


def test_the_oldest_turns_are_dropped_and_it_is_said_once(tok: Tokenizer) -> None:
    made, screen = a_chat(tok, "fine", context=150)
    for i in range(12):
        made.ask(f"question number {i}")
    assert screen.text.count("left out") == 1
    last = made.engine.prompts[-1]  # type: ignore[attr-defined]
    assert len(last) < 150
    text = tok.decode(last)
    assert "number 11" in text and "number 0" not in text
    assert last[0] == tok.bos_id


def test_a_message_that_can_never_fit_is_refused_and_forgotten(tok: Tokenizer) -> None:
    made, _ = a_chat(tok, "fine", context=60)
    with pytest.raises(UserError, match="too long"):
        made.ask("word " * 200)
    assert made.messages == []


def test_commands(tok: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = a_chat(tok, "first", "second")
    for line in ("/stats", "/retry"):
        with pytest.raises(UserError):
            handle(made, line)
    handle(made, "")
    handle(made, "Hello")
    handle(made, "/temp 0.7")
    handle(made, "/dry 0.4")
    handle(made, "/seed 5")
    handle(made, "/system Be brief.")
    handle(made, "/retry")
    assert made.settings == Settings(
        temperature=0.7, dry_multiplier=0.4, seed=6, max_tokens=100, system="Be brief."
    )
    assert made.messages[-1]["content"] == [{"type": "text", "text": "second"}]
    assert len(made.messages) == 2
    assert "Be brief." in tok.decode(made.engine.prompts[-1])  # type: ignore[attr-defined]
    handle(made, "/help")
    handle(made, "/stats")
    assert "tokens/s" in capsys.readouterr().out
    path = tmp_path / "talk.json"
    handle(made, f"/save {path}")
    assert json.loads(path.read_text())["messages"] == made.messages
    for line in (
        f"/save {path}",
        "/save",
        "/temp hot",
        "/temp -1",
        "/dry x",
        "/dry -1",
        "/nonsense",
    ):
        with pytest.raises(UserError):
            handle(made, line)
    handle(made, "/clear")
    assert made.messages == [] and made.settings.temperature == 0.7


# -- the terminal --------------------------------------------------------------------------------


@pytest.fixture
def opened(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """`open_chat` gives a chat with a stand-in engine that says "Paris."."""
    engine = FakeEngine([[*tok.encode("Paris."), tok.eos_id]])

    @contextlib.contextmanager
    def open_fake(path: Path, settings: Settings, **_: Any) -> Iterator[Chat]:
        yield Chat(
            engine,
            tok,
            context=400,
            settings=settings,
            make_params=lambda now: now,
            write=chat.to_stdout,
        )

    monkeypatch.setattr(chat, "open_chat", open_fake)
    monkeypatch.setattr(chat_terminal, "open_chat", open_fake)
    return engine


def test_one_shot(opened: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.one_shot(tmp_path, "Capital of France?", Settings()) == 0
    assert capsys.readouterr().out == "Paris.\n"
    with pytest.raises(UserError, match="empty"):
        chat.one_shot(tmp_path, " \n", Settings())
    opened.interrupt_after = 1
    assert chat.one_shot(tmp_path, "Capital of France?", Settings()) == 75
    assert capsys.readouterr().out.endswith("(stopped)\n")


def test_the_prompt_from_standard_input(
    opened: FakeEngine,
    tok: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fledge.cli import main

    monkeypatch.setattr(sys, "stdin", io.StringIO("Was ist die Hauptstadt?\n"))
    assert main(["chat", str(tmp_path), "-p", "-", "--max-tokens", "9", "--seed", "3"]) == 0
    assert capsys.readouterr().out == "Paris.\n"
    assert "Hauptstadt?" in tok.decode(opened.prompts[0])
    assert opened.settings[0] == Settings(seed=3, max_tokens=9)


def test_talking_without_a_terminal(
    opened: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/nonsense\n\n/quit\nnever read\n"))
    assert talk(tmp_path, Settings()) == 0
    out = capsys.readouterr()
    assert out.out == "Paris.\n"
    assert "there is no command /nonsense" in out.err
    assert len(opened.prompts) == 1


def test_the_sample_conversation(
    opened: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "r")
    assert chat.sample_conversation(run.path, Settings()) == 0
    out = capsys.readouterr().out
    assert out.count("you:    ") == out.count("model:  Paris.") == 5
    assert "you:    Who are you?" in out
    assert out.rstrip().endswith(f"fledge chat {run.path}")


def test_which_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        with pytest.raises(UserError, match="no trained model yet"):
            find_checkpoint(run.path)
        base = write_checkpoint(run, "base", 5)
        sft = write_checkpoint(run, "sft", 5)
        assert find_checkpoint(run.path)[::2] == (sft, "sft")
        assert find_checkpoint(run.stage_dir("base"))[::2] == (base, "base")
        assert find_checkpoint(base)[::2] == (base, "base")
    with pytest.raises(UserError, match="holds no model"):
        find_checkpoint(tmp_path)
