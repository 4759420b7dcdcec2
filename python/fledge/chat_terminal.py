"""The conversation in the terminal: reading messages of many lines, and the / commands.

`talk` reads until /quit, Ctrl-D or the end of standard input. On a terminal it greets, edits with
readline (arrow keys, history, pastes of many lines) and colours; with a pipe on either side it
prints answers only. Ctrl-C stops an answer or drops what was typed, never the program. Called by
`fledge chat`; what was said, and what of it fits the model, is `fledge.chat`'s business.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fledge import files
from fledge.chat import Chat, Settings, open_chat
from fledge.errors import EXIT_DONE, UserError
from fledge.tokenizer.chat import render_prompt

HELP = """\
/help            this list
/temp X          sampling temperature; 0 leaves nothing to chance
/dry X           how firmly going round in circles is held back: 0.8; 0 = not at all
/seed N          seed of the sampling
/system TEXT     a system message; without TEXT none
/retry           answer the last question again, with the next seed
/stats           tokens and speed of the last answer, and what of the talk still fits
/clear           forget the conversation
/save FILE       write the conversation and its settings as JSON
/load FILE       go on with a saved one
/quit            leave (or Ctrl-D)
Ctrl-C stops an answer. A message of many lines: paste it, end lines with \\, or put \"\"\" before
and behind it. An answer may take what --max-tokens says, but at most a third of the context; of
what was said before, the newest turns that fit the rest are read, and older ones are left out."""

BLOCK = '"""'


@dataclass(frozen=True)
class Colours:
    """Escape codes, or empty strings where nobody sees colours."""

    you: str = ""
    model: str = ""
    faint: str = ""
    bad: str = ""
    off: str = ""


COLOURED = Colours("\x1b[1;36m", "\x1b[1;32m", "\x1b[2m", "\x1b[31m", "\x1b[0m")


def colours_of(stream: Any) -> Colours:
    """Colours for a terminal; none for pipes and files, NO_COLOR (no-color.org) and TERM=dumb."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return Colours()
    return COLOURED if stream.isatty() else Colours()


def talk(path: Path, settings: Settings) -> int:
    """A conversation until /quit, Ctrl-D or the end of standard input; returns the exit code."""
    terminal = sys.stdin.isatty()
    colours = colours_of(sys.stdout)
    reader = Reader(terminal=terminal, colours=colours)
    with open_chat(path, settings, tool_colour=(colours.faint, colours.off)) as chat:
        if terminal:
            print(greeting(chat))
        while True:
            try:
                message = reader.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if message.strip() == "/quit":
                break
            answers = message.strip() and not message.startswith("/")
            if terminal and (answers or message.strip() == "/retry"):
                print(f"{colours.model}model:{colours.off} ", end="", flush=True)
            try:
                handle(chat, message)
            except UserError as error:
                print(f"{colours_of(sys.stderr).bad}error:{colours_of(sys.stderr).off} {error}",
                      file=sys.stderr)  # fmt: skip
            except KeyboardInterrupt:  # between two tokens, or while a command runs
                print("\n(stopped)")
    if terminal:
        print()
    return EXIT_DONE


def greeting(chat: Chat) -> str:
    """What this is, and what not to expect of it."""
    return (
        f"This model reads {chat.context} tokens at a time. It knows what it was taught and "
        "calculates with a tool;\nbeyond that it makes things up. "
        "/help lists the commands, /quit leaves."
    )


class Reader:
    """Messages from the keyboard or a pipe."""

    def __init__(self, *, terminal: bool, colours: Colours, ask: Callable[[str], str] = input):
        self._ask = ask
        self._first = self._more = ""
        if terminal:
            you, off = colours.you, colours.off
            with contextlib.suppress(ImportError):
                import readline  # gives input() arrow keys and history

                # Python turns this off for its own prompt; here a paste is one message
                readline.parse_and_bind("set enable-bracketed-paste on")
                # readline must know which characters take no room, or long lines wrap wrongly
                you, off = (f"\x01{code}\x02" if code else "" for code in (you, off))
            self._first, self._more = f"\n{you}you:{off} ", f"{you}...{off}  "

    def read(self) -> str:
        """The next message; EOFError at the end. A block that never closes ends with the input."""
        line = self._ask(self._first)
        if line.strip().startswith(BLOCK):
            return self._block(line.strip().removeprefix(BLOCK))
        lines = [line]
        while lines[-1].endswith("\\") and not lines[-1].endswith("\\\\"):
            lines[-1] = lines[-1][:-1]
            try:
                lines.append(self._ask(self._more))
            except EOFError:
                break
        return "\n".join(lines)

    def _block(self, line: str) -> str:
        lines: list[str] = []
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            try:
                line = self._ask(self._more)
            except EOFError:
                return "\n".join(lines).strip("\n")
        lines.append(line.rstrip().removesuffix(BLOCK))
        return "\n".join(lines).strip("\n")


# -- commands ------------------------------------------------------------------------------------


def handle(chat: Chat, message: str) -> None:
    """One message of the user: a command, or something to say."""
    message = message.strip()
    if not message:
        return
    if not message.startswith("/"):
        chat.ask(message)
        return
    word, _, rest = message.partition(" ")
    command = _COMMANDS.get(word)
    if command is None:
        raise UserError(f"there is no command {word}", "it is not in the list", "/help shows them")
    command(chat, rest.strip())


def _set_temperature(chat: Chat, text: str) -> None:
    value = _number(text, float)
    if not 0 <= value <= 10:
        raise UserError(f"temperature {text}", "it is out of range", "give 0 to 10")
    chat.settings = replace(chat.settings, temperature=value)


def _set_dry(chat: Chat, text: str) -> None:
    value = _number(text, float)
    if not 0 <= value <= 100:
        raise UserError(f"dry {text}", "it is out of range", "give 0 to 100; 0.8 is usual")
    chat.settings = replace(chat.settings, dry_multiplier=value)


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
    left = f", its oldest {chat.left_out} messages are left out" if chat.left_out else ""
    print(
        f"{len(reply.ids)} tokens in {reply.seconds:.2f} s ({rate:.0f} tokens/s, first after "
        f"{reply.first_seconds:.2f} s); the conversation is {used} of {chat.context} tokens{left}; "
        f"temperature {chat.settings.temperature:g}, dry {chat.settings.dry_multiplier:g}, "
        f"seed {chat.settings.seed}"
    )


def _save(chat: Chat, text: str) -> None:
    path = _path(text, "/save")
    if path.exists():
        raise UserError(f"{path} exists", "nothing is overwritten", "choose another name")
    files.write_json(path, {"messages": chat.messages, "settings": asdict(chat.settings)})
    print(f"saved to {path}")


def _load(chat: Chat, text: str) -> None:
    path = _path(text, "/load")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        messages = saved["messages"]
        render_prompt(chat.tokenizer, messages)  # refuses roles and parts that there are not
        loaded = _settings(chat.settings, saved.get("settings", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        told = isinstance(error, (OSError, UserError))
        raise UserError(
            f"{path} cannot be loaded",
            str(error) if told else "it is no saved conversation",
            "give a file that /save wrote",
        ) from None
    chat.clear()
    chat.messages, chat.settings = messages, loaded
    asked = sum(message["role"] == "user" for message in messages)
    print(f"loaded {path}: {asked} {'question' if asked == 1 else 'questions'}")


def _settings(now: Settings, saved: dict[str, Any]) -> Settings:
    """`now` with what a file says; ValueError for values that no command would take."""
    wanted = asdict(now) | {k: v for k, v in saved.items() if k in asdict(now)}
    temperature, system = wanted["temperature"], wanted["system"]
    dry = wanted["dry_multiplier"]
    whole = [wanted["seed"], wanted["max_tokens"]]
    sound = (
        isinstance(temperature, (int, float))
        and 0 <= temperature <= 10
        and isinstance(dry, (int, float))
        and 0 <= dry <= 100
        and all(type(number) is int for number in whole)
        and wanted["max_tokens"] > 0
        and isinstance(system, (str, type(None)))
    )
    if not sound:
        raise ValueError("settings")
    return Settings(**wanted)


def _path(text: str, command: str) -> Path:
    if not text:
        raise UserError("which file?", f"{command} needs a name", f"{command} talk.json")
    return Path(text).expanduser()


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": lambda _, __: print(HELP),
    "/temp": _set_temperature,
    "/dry": _set_dry,
    "/seed": _set_seed,
    "/system": _set_system,
    "/retry": _retry,
    "/stats": _stats,
    "/clear": lambda chat, _: chat.clear(),
    "/save": _save,
    "/load": _load,
}
