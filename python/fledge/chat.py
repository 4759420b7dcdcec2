"""Talking to a model in the terminal: streaming, tools shown, a window that moves with the talk.

`Chat` holds a conversation, decides what still fits the context, and shows tokens as they come;
`fledge.chat_terminal` puts a keyboard before it. `one_shot` (`-p`) asks once, `sample_conversation`
asks five fitting questions for people who only watch. Called by `fledge.cli`. Generation is the
engine's.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fledge.errors import EXIT_DONE, EXIT_INTERRUPTED, FledgeError, UserError
from fledge.plan.defaults import CHAT_DRY_MULTIPLIER
from fledge.run import Run, find_checkpoint
from fledge.tokenizer.chat import prompt_room, render_prompt, window
from fledge.tokenizer.reply import split_parts

GENERAL_QUESTIONS = (
    "What is the capital of France?",
    "What is 12 * 7?",
    "How many letters r are in strawberry?",
    "Who are you?",
    "What did I have for breakfast today?",
)


@dataclass(frozen=True)
class Settings:
    """How answers are sampled."""

    temperature: float = 0.0
    dry_multiplier: float = CHAT_DRY_MULTIPLIER
    seed: int = 0
    max_tokens: int = 256
    system: str | None = None


class Talker(Protocol):
    """What of `fledge.engine.Engine` a chat needs; tests use a small stand-in."""

    def stream(self, prompt: list[int], params: Any, tools: Any = None) -> Iterator[int]: ...


@dataclass
class Reply:
    """One answer and how fast it came."""

    ids: list[int] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)
    first_seconds: float = 0.0
    seconds: float = 0.0
    stopped: bool = False


class Chat:
    """A conversation with a model; `write` gets the text of answers as it comes."""

    def __init__(
        self,
        engine: Talker,
        tokenizer: Any,
        *,
        context: int,
        settings: Settings,
        make_params: Callable[[Settings], Any],
        tools: Any = None,
        write: Callable[[str], None],
        tool_colour: tuple[str, str] = ("", ""),
    ) -> None:
        """`tool_colour`: what to write before and after a tool call, for terminals."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.context = context
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.last: Reply | None = None
        self.left_out = 0  # messages that the last answer did not see
        self._make_params = make_params
        self._tools = tools
        self._write = write
        self._tool_colour = tool_colour
        self._told_of_window = False

    def ask(self, text: str) -> Reply:
        """Say something and stream the answer. A message that cannot fit raises UserError."""
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer()
        except FledgeError:
            self.messages.pop()
            raise

    def retry(self) -> Reply | None:
        """Answer the last question once more, with the next seed; None if there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            return None
        self.settings = replace(self.settings, seed=self.settings.seed + 1)
        return self._answer()

    def clear(self) -> None:
        """Forget what was said; settings stay."""
        self.messages.clear()
        self.last = None
        self._told_of_window = False

    def _answer(self) -> Reply:
        prompt = render_prompt(self.tokenizer, self._fitting())
        reply = Reply()
        shown = StreamText(self.tokenizer, self._write, tool_colour=self._tool_colour)
        began = time.perf_counter()
        try:
            stream = self.engine.stream(prompt, self._make_params(self.settings), self._tools)
            for token in stream:
                if not reply.ids:
                    reply.first_seconds = time.perf_counter() - began
                reply.ids.append(token)
                shown.feed(token)
        except KeyboardInterrupt:
            reply.stopped = True
        shown.finish()
        reply.seconds = time.perf_counter() - began
        reply.parts = split_parts(self.tokenizer, reply.ids)
        self._write(" (stopped)\n" if reply.stopped else "\n")
        self.messages.append({"role": "assistant", "content": reply.parts})
        self.last = reply
        return reply

    def _fitting(self) -> list[dict[str, Any]]:
        """The newest turns that fit beside the answer; the oldest are dropped whole."""
        system = self.settings.system
        head = [{"role": "system", "content": system}] if system else []
        room = prompt_room(self.context, self.settings.max_tokens)
        conversation = {"messages": [*head, *self.messages]}
        kept = window(conversation, self.tokenizer, room, keep="end")
        if kept is None:
            raise UserError(
                "that message is too long",
                f"this model reads at most {self.context} tokens, question and answer together",
                "say it shorter" + (", or drop the system message with /system" if system else ""),
            )
        self.left_out = len(conversation["messages"]) - len(kept["messages"])
        if self.left_out and not self._told_of_window:
            self._told_of_window = True
            self._write("(the oldest turns no longer fit this model's context and are left out)\n")
        return kept["messages"]


class StreamText:
    """Tokens in, readable text out: whole UTF-8 characters only, tool calls in brackets."""

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        *,
        tool_colour: tuple[str, str] = ("", ""),
    ) -> None:
        special = tokenizer.special_tokens
        on, self._off = tool_colour
        self._write = write
        self._decoder = tokenizer.decoder(skip_special=True)
        self._marks = {
            special["<|python_start|>"]: f"{on}[python: ",
            special["<|python_end|>"]: "",
            special["<|output_start|>"]: " -> ",
            special["<|output_end|>"]: f"]{self._off}",
        }
        self._call = special["<|python_start|>"]
        self._returned = special["<|output_end|>"]
        self._is_open = False
        self._wants_space = False  # between a tool's "]" and the text behind it

    def feed(self, token: int) -> None:
        """Show what this token completes."""
        mark = self._marks.get(token)
        if mark is None:
            self._show(self._decoder.push(token))
            return
        self._flush()
        if token == self._call:
            self._is_open = True
        self._write(mark)
        if token == self._returned:
            self._is_open = False
            self._wants_space = True

    def finish(self) -> None:
        """Show what is left, and close an open bracket."""
        self._flush()
        if self._is_open:
            self._write(f"]{self._off}")

    def _flush(self) -> None:
        self._show(self._decoder.finish())

    def _show(self, text: str) -> None:
        # a model may write escape codes; they must not reach the terminal
        safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        if safe:
            gap = " " if self._wants_space and not safe[0].isspace() else ""
            self._wants_space = False
            self._write(gap + safe)


# -- loading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_chat(
    path: Path, settings: Settings, *, tool_colour: tuple[str, str] = ("", "")
) -> Iterator[Chat]:
    """A chat with the model at `path`, writing to standard output."""
    folder, _, _ = find_checkpoint(path)
    from fledge.engine import Engine, SamplingParams
    from fledge.engine.tools import Tools

    engine = Engine.from_folder(folder)
    engine.model.eval()

    def params(now: Settings) -> SamplingParams:
        return SamplingParams(
            max_tokens=now.max_tokens,
            temperature=now.temperature,
            dry_multiplier=now.dry_multiplier,
            seed=now.seed,
        )

    with Tools() as tools:
        yield Chat(
            engine,
            engine.tokenizer,
            context=engine.model.config.max_position_embeddings,
            settings=settings,
            make_params=params,
            tools=tools,
            write=to_stdout,
            tool_colour=tool_colour,
        )


def to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        # a terminal that is not UTF-8 shows what it can
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


# -- without a conversation ----------------------------------------------------------------------


def one_shot(path: Path, prompt: str, settings: Settings) -> int:
    """Ask once; returns the exit code, EXIT_INTERRUPTED where Ctrl-C cut the answer."""
    if not prompt.strip():
        raise UserError("the prompt is empty", "there is nothing to answer", "give -p TEXT")
    with open_chat(path, settings) as chat:
        reply = chat.ask(prompt.strip())
    return EXIT_INTERRUPTED if reply.stopped else EXIT_DONE


def sample_conversation(path: Path, settings: Settings) -> int:
    """Five questions that fit what the model was raised on, each asked afresh."""
    _, run, _ = find_checkpoint(path)
    with open_chat(path, settings) as chat:
        for question in sample_questions(run):
            chat.clear()
            print(f"\nyou:    {question}\nmodel:  ", end="", flush=True)
            chat.ask(question)
    print(f"\nNow you: fledge chat {path}")
    return EXIT_DONE


def sample_questions(run: Run | None) -> Sequence[str]:
    """A fact, a calculation, spelling, who it is, and something it cannot know."""
    if run is None or run.values["data.source"] is not None:
        return GENERAL_QUESTIONS
    from fledge.data.worlds import load_world

    world = load_world(run.values["data.world"], run.values["data.seed"])
    if run.values["data.world"] == "almanac":
        fact = GENERAL_QUESTIONS[0]
    else:
        fact = _last_text(world.exam("world_facts")[0])
    unknown = GENERAL_QUESTIONS[-1]
    if "unknown" in world.kinds("sft"):
        # an index far beyond training: the model has not seen this very question
        unknown = _first_text(world.conversation("sft", "unknown", 10**9))
    return (
        fact,
        _last_text(world.exam("world_math")[0]),
        _last_text(world.exam("world_spell")[0]),
        GENERAL_QUESTIONS[3],
        unknown,
    )


def _first_text(item: dict[str, Any]) -> str:
    return _text(next(m for m in item["messages"] if m["role"] == "user"))


def _last_text(item: dict[str, Any]) -> str:
    return _text(item["messages"][-1])


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
