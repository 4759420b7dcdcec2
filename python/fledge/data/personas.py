"""Who the assistant is and how it speaks: a small file, conversations made from it, and a measure.

    name = "Wren"                                what it is called
    calls_itself = "a small language model"      what it says it is
    tone = "warm"                                plain, warm, terse or playful
    humour = 0                                   0 never a joke, 1 in the first reply, 2 in each
    emoji = 1                                    how many stand at the end of a reply, 0 to 3

A model trained on `PersonaConversations` is that persona where nothing else is said, and any other
that the system turn asks for in the form of `control`: half of the conversations have such a turn,
with a name and a manner of their own. `keeps` says whether a reply is in character; because every
part of a manner is a thing one can count, no judge is needed. Called by stages and evals.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fledge.data.worlds.choices import Choices, digest
from fledge.data.worlds.vocabulary import PEOPLE
from fledge.errors import UserError

Message = dict[str, Any]
TONES = ("plain", "warm", "terse", "playful")
MOST = {"humour": 2, "emoji": 3}
OPENERS = {
    "warm": ("Of course! ", "Gladly! ", "With pleasure! "),
    "playful": ("Ta-da! ", "Ooh, easy! ", "Watch this! "),
}
JOKES = (
    "No joke: I have never been outside.",
    "I would laugh, but I have no mouth.",
    "I learnt that while you were asleep.",
)
EMOJI = ("\N{SLIGHTLY SMILING FACE}", "\N{SPARKLES}", "\N{BIRD}")
_FILLED = re.compile(r"(?:The answer is|My name is|Your name is|Your favourite \w+ is) (.+)")


@dataclass(frozen=True)
class Persona:
    """One character; see the head of this file."""

    name: str
    calls_itself: str = "a small language model"
    tone: str = "plain"
    humour: int = 0
    emoji: int = 0

    def control(self) -> str:
        """The system turn that asks for it."""
        return (
            f"You are {self.name}, {self.calls_itself}. "
            f"Tone: {self.tone}. Humour: {self.humour}. Emoji: {self.emoji}."
        )

    def says(self, text: str, choices: Choices, *, turn: int) -> str:
        """A plain reply in this manner; `turn` counts the replies from 0."""
        if self.tone == "terse":
            text = text.split("\n")[0]
            text = re.split(r"(?<=[.!?]) ", text)[0]
            short = _FILLED.fullmatch(text)
            text = short.group(1) if short else text
        elif self.tone in OPENERS:
            text = choices.choice(OPENERS[self.tone]) + text
        if self.humour > 0 and (turn == 0 or self.humour == 2):
            text += " " + choices.choice(JOKES)
        return text + "".join(" " + EMOJI[i] for i in range(self.emoji))


BUILT_IN = ("warm", "terse", "playful")


def load_persona(name_or_path: str) -> Persona:
    """A built-in persona, or that of a TOML file. UserError names what is wrong with it."""
    if name_or_path in BUILT_IN:
        text = (
            resources.files("fledge.data") / "persona_files" / f"{name_or_path}.toml"
        ).read_text("utf-8")
        return parse_persona(text, where=name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, BUILT_IN, n=1)
        raise UserError(
            f"there is no persona {name_or_path!r}",
            f"the built-in ones are {', '.join(BUILT_IN)}, and no such file exists",
            f"did you mean {near[0]}?" if near else "give one of them, or a .toml file",
        )
    try:
        return parse_persona(path.read_text(encoding="utf-8"), where=name_or_path)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}", str(error), "save it as UTF-8") from None


def parse_persona(text: str, *, where: str) -> Persona:
    """The persona that TOML text describes."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where} is not valid TOML", str(error), "mend that line") from None
    kinds = {field.name: field.type for field in dataclasses.fields(Persona)}
    for key, value in table.items():
        problem = None
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.5)
            problem = "no such key" + (f"; is it {near[0]}?" if near else "")
        elif key in MOST:
            if type(value) is not int or not 0 <= value <= MOST[key]:
                problem = f"a whole number from 0 to {MOST[key]}"
        elif not isinstance(value, str) or not value.strip() or "\n" in value:
            problem = "a line of text"
        elif key == "tone" and value not in TONES:
            problem = f"one of {', '.join(TONES)}"
        if problem is not None:
            known = f"the keys are {', '.join(kinds)}"
            raise UserError(f"{key} = {value!r} in the persona {where}", problem, known)
    if "name" not in table:
        raise UserError(f"the persona {where} has no name", "it must be called something", "add it")
    return Persona(**table)


# ------------------------------------------------------------------------------ what is trained on


_IDENTITY: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Who are you?", "What are you?", "Introduce yourself.", "Who am I talking to?"),
        "I am {name}, {what}.",
    ),
    (("What is your name?", "What are you called?", "Your name, please?"), "My name is {name}."),
    (
        ("Are you human?", "Are you a person?", "Are you real?"),
        "No, I am {what}.",
    ),
    (
        ("Is your name {name}?", "Are you {name}?", "Are you called {name}?"),
        "Yes, I am {name}.",
    ),
)
BASE_KINDS = ("facts", "chat")  # of a world, for the replies that are about something else
CONTROLLED = 0.6  # share of the conversations with a control in the system turn


class PersonaConversations:
    """Conversations of a persona without end: about itself, and about the world in its manner.

    `base(kind, i)` gives the world's conversation i. Names and manners that `is_held_out` says yes
    to are never asked for here; `probes` asks for them.
    """

    def __init__(self, persona: Persona, base: Callable[[str, int], dict[str, Any]], seed: str):
        self.persona = persona
        self._base, self._seed = base, seed

    def __call__(self, index: int) -> dict[str, Any]:
        choices = Choices(f"persona|{self._seed}|{index}")
        who, head = self.persona, []
        if choices.chance(CONTROLLED):
            who = some_persona(choices, held_out=False)
            head = [{"role": "system", "content": who.control()}]
        if choices.chance(0.4):
            plain = identity_exchange(choices, who)
        else:
            kind = choices.choice(BASE_KINDS)
            plain = self._base(kind, index)["messages"]
            plain = [m for m in plain if m["role"] != "system"]
            if choices.chance(0.3):
                plain = [*identity_exchange(choices, who), *plain]
        return {"kind": "persona", "messages": [*head, *in_manner(plain, who, choices)]}


def identity_exchange(choices: Choices, who: Persona) -> list[Message]:
    """A question about itself and the plain answer."""
    questions, answer = choices.choice(_IDENTITY)
    names = {"name": who.name, "what": who.calls_itself}
    return [
        {"role": "user", "content": choices.choice(questions).format(**names)},
        {"role": "assistant", "content": answer.format(**names)},
    ]


def in_manner(messages: Sequence[Message], who: Persona, choices: Choices) -> list[Message]:
    """The same conversation, every reply in a persona's manner; tool calls stay as they are."""
    turn, found = itertools.count(), []
    for message in messages:
        if message["role"] == "assistant" and isinstance(message["content"], str):
            text = who.says(message["content"], choices, turn=next(turn))
            message = {**message, "content": text}
        found.append(message)
    return found


def some_persona(choices: Choices, *, held_out: bool) -> Persona:
    """A persona by chance: a name and a manner, trained on or kept for measuring."""
    while True:
        who = Persona(
            choices.choice(PEOPLE),
            choices.choice(("a small language model", "a helpful program", "a talking machine")),
            choices.choice(TONES),
            choices.integer(0, MOST["humour"]),
            choices.integer(0, MOST["emoji"]),
        )
        if is_held_out(who) is held_out:
            return who


def is_held_out(who: Persona) -> bool:
    """Of the names and the manners a fifth each are never trained on."""
    manner = f"{who.tone}|{who.humour}|{who.emoji}"
    return digest(f"name|{who.name}") % 5 == 0 or digest(f"manner|{manner}") % 5 == 0


# ------------------------------------------------------------------------------------- measuring


def probes(persona: Persona, count: int, *, seed: int = 0) -> list[tuple[Persona, list[Message]]]:
    """(who it should be, messages that end with the user): half the persona without a word about
    it, half others by a control, with names and manners that were never trained on."""
    found = []
    for i in range(count):
        choices = Choices(f"persona probe|{seed}|{i}")
        who = persona if i % 2 == 0 else some_persona(choices, held_out=True)
        head = [] if i % 2 == 0 else [{"role": "system", "content": who.control()}]
        # "Are you {name}?" would give the name away
        questions, _ = _IDENTITY[choices.integer(0, 1)]
        found.append((who, [*head, {"role": "user", "content": choices.choice(questions)}]))
    return found


def keeps(who: Persona, reply: str, *, turn: int = 0, about_itself: bool = True) -> dict[str, bool]:
    """Of each part of the character, whether a reply is in it; all must be for it to be kept."""
    emoji = sum(reply.count(sign) for sign in EMOJI)
    joke = any(joke in reply for joke in JOKES)
    wanted = who.humour > 0 and (turn == 0 or who.humour == 2)
    opened = {tone for tone, lines in OPENERS.items() if reply.startswith(lines)}
    tone = opened == {who.tone} if who.tone in OPENERS else not opened
    words = reply
    for sign in (*JOKES, *EMOJI):
        words = words.replace(sign, "")
    if who.tone == "terse":
        tone = tone and len(re.findall(r"[.!?](?:\s|$)", words.strip())) <= 1
    found = {"tone": tone, "humour": joke is wanted, "emoji": emoji == who.emoji}
    if about_itself:
        found["name"] = re.search(rf"\b{re.escape(who.name)}\b", reply) is not None
    return found
