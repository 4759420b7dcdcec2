"""Talking to a model in the terminal: streaming, tools shown, a window that moves with the talk.

`fledge chat MODEL` opens a conversation, `-p` asks once, `sample_conversation` asks five fitting
questions for people who only watch. Called by `fledge.cli`. Generation is the engine's; this module
holds the conversation, decides what still fits the context, and shows tokens as they come.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fledge import files
from fledge.errors import EXIT_DONE, FledgeError, UserError
from fledge.run import Run, find_checkpoint
from fledge.tokenizer.chat import render_prompt, window
from fledge.tokenizer.reply import split_parts

HELP = """\
/help            this list
/temp X          sampling temperature; 0 always takes the likeliest token
/seed N          seed of the sampling
/system TEXT     a system message; without TEXT none
/retry           answer the last question again, with the next seed
/stats           tokens and speed of the last answer
/clear           forget the conversation
/save FILE       write the conversation as JSON
/quit            leave (or Ctrl-D); Ctrl-C stops an answer"""

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
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.context = context
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.last: Reply | None = None
        self._make_params = make_params
        self._tools = tools
        self._write = write
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
        shown = StreamText(self.tokenizer, self._write)
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
        room = self.context - min(self.settings.max_tokens, self.context // 3) - 1
        conversation = {"messages": [*head, *self.messages]}
        kept = window(conversation, self.tokenizer, room, keep="end")
        if kept is None:
            raise UserError(
                "that message is too long",
                f"this model reads at most {self.context} tokens, question and answer together",
                "say it shorter" + (", or drop the system message with /system" if system else ""),
            )
        dropped = len(conversation["messages"]) - len(kept["messages"])
        if dropped and not self._told_of_window:
            self._told_of_window = True
            self._write("(the oldest turns no longer fit this model's context and are left out)\n")
        return kept["messages"]


class StreamText:
    """Tokens in, readable text out: whole UTF-8 characters only, tool calls in brackets."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        special = tokenizer.special_tokens
        self._write = write
        self._decoder = tokenizer.decoder(skip_special=True)
        self._marks = {
            special["<|python_start|>"]: "[python: ",
            special["<|python_end|>"]: "",
            special["<|output_start|>"]: " -> ",
            special["<|output_end|>"]: "]",
        }
        self._call = special["<|python_start|>"]
        self._returned = special["<|output_end|>"]
        self._is_open = False

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

    def finish(self) -> None:
        """Show what is left, and close an open bracket."""
        self._flush()
        if self._is_open:
            self._write("]")

    def _flush(self) -> None:
        self._show(self._decoder.finish())

    def _show(self, text: str) -> None:
        # a model may write escape codes; they must not reach the terminal
        safe = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        if safe:
            self._write(safe)


# -- loading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_chat(path: Path, settings: Settings) -> Iterator[Chat]:
    """A chat with the model at `path`, writing to standard output."""
    folder, _, _ = find_checkpoint(path)
    from fledge.engine import Engine, SamplingParams
    from fledge.engine.tools import Tools

    engine = Engine.from_folder(folder)
    engine.model.eval()

    def params(now: Settings) -> SamplingParams:
        return SamplingParams(max_tokens=now.max_tokens, temperature=now.temperature, seed=now.seed)

    with Tools() as tools:
        yield Chat(
            engine,
            engine.tokenizer,
            context=engine.model.config.max_position_embeddings,
            settings=settings,
            make_params=params,
            tools=tools,
            write=_to_stdout,
        )


def _to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        # a terminal that is not UTF-8 shows what it can
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


# -- the three ways to talk ----------------------------------------------------------------------


def one_shot(path: Path, prompt: str, settings: Settings) -> int:
    """Ask once; returns the exit code."""
    if not prompt.strip():
        raise UserError("the prompt is empty", "there is nothing to answer", "give -p TEXT")
    with open_chat(path, settings) as chat:
        chat.ask(prompt.strip())
    return EXIT_DONE


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


def talk(path: Path, settings: Settings) -> int:
    """A conversation until /quit, Ctrl-D or the end of standard input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    terminal = sys.stdin.isatty()
    with open_chat(path, settings) as chat:
        if terminal:
            print("Type a message; /help lists the commands, /quit leaves.")
        while True:
            try:
                line = input("\nyou: " if terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if line == "/quit":
                break
            try:
                handle(chat, line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    if terminal:
        print()
    return EXIT_DONE


def handle(chat: Chat, line: str) -> None:
    """One line of the user: a command, or something to say."""
    if not line:
        return
    if not line.startswith("/"):
        chat.ask(line)
        return
    word, _, rest = line.partition(" ")
    command = _COMMANDS.get(word)
    if command is None:
        raise UserError(f"there is no command {word}", "it is not in the list", "/help shows them")
    command(chat, rest.strip())


def _set_temperature(chat: Chat, text: str) -> None:
    value = _number(text, float)
    if not 0 <= value <= 10:
        raise UserError(f"temperature {text}", "it is out of range", "give 0 to 10")
    chat.settings = replace(chat.settings, temperature=value)


def _set_seed(chat: Chat, text: str) -> None:
    chat.settings = replace(chat.settings, seed=_number(text, int))


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{text!r} is not a number", "the command needs one", "/help") from None


def _set_system(chat: Chat, text: str) -> None:
    chat.settings = replace(chat.settings, system=text or None)


def _retry(chat: Chat, _: str) -> None:
    if chat.retry() is None:
        raise UserError("nothing to retry", "nothing was asked yet", "ask something first")


def _stats(chat: Chat, _: str) -> None:
    if chat.last is None:
        raise UserError("no answer yet", "there is nothing to measure", "ask something first")
    reply, used = chat.last, len(render_prompt(chat.tokenizer, chat.messages))
    rate = len(reply.ids) / reply.seconds if reply.seconds > 0 else 0.0
    print(
        f"{len(reply.ids)} tokens in {reply.seconds:.2f} s ({rate:.0f} tokens/s, first after "
        f"{reply.first_seconds:.2f} s); the conversation is {used} of {chat.context} tokens; "
        f"temperature {chat.settings.temperature:g}, seed {chat.settings.seed}"
    )


def _save(chat: Chat, text: str) -> None:
    if not text:
        raise UserError("where to?", "/save needs a file name", "/save talk.json")
    path = Path(text)
    if path.exists():
        raise UserError(f"{path} exists", "nothing is overwritten", "choose another name")
    files.write_json(path, {"messages": chat.messages})
    print(f"saved to {path}")


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": lambda _, __: print(HELP),
    "/temp": _set_temperature,
    "/seed": _set_seed,
    "/system": _set_system,
    "/retry": _retry,
    "/stats": _stats,
    "/clear": lambda chat, _: chat.clear(),
    "/save": _save,
}
