"""The exams of a world: facts, multiple choice, word problems, spelling, conversation.

Multiple choice is scored as CORE does (DCLM): the option whose whole reply is likeliest per token
wins; the other exams are graded on what the model says.

Items come from `data.worlds`; this module says how a reply is graded and wraps an exam as a task
for `evals.scoring`. `grade` is also the reward of reinforcement. Matching is strict: an answer that
names a rival answer as well is wrong.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from fledge.data.worlds import World
from fledge.tokenizer.reply import last_number

KINDS = ("facts", "mc", "math", "count", "spell", "chat")
EXAMS = ("world_facts", "world_mc", "world_math", "world_spell", "world_chat")
_LETTER = re.compile(r"\b([A-D])\b")


def _says(text: str, phrase: str) -> bool:
    """True if the phrase stands in the text as whole words."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def grade_fact(item: dict[str, Any], text: str) -> bool:
    """The answer (or an accepted variant) is said and no rival answer is."""
    accepted = [item["answer"], *item.get("accept", [])]
    if not any(_says(text, phrase) for phrase in accepted):
        return False
    rest = text
    for phrase in sorted(accepted, key=len, reverse=True):
        rest = rest.replace(phrase, " ")
    return not any(_says(rest, rival) for rival in item.get("rivals", []))


def chosen_letter(text: str) -> str | None:
    """The letter a multiple-choice reply settles on: the last one that stands alone."""
    found = _LETTER.findall(text.rsplit("Answer:", 1)[-1])
    return found[-1] if found else None


def grade_number(item: dict[str, Any], text: str) -> bool:
    """The last number of the reply equals the answer."""
    number = last_number(text)
    return number is not None and _canonical(number) == _canonical(item["answer"])


def _canonical(number: str) -> str:
    number = number.replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number


def grade_spelling(item: dict[str, Any], text: str) -> bool:
    """Exactly the letters, joined by hyphens; a final full stop is forgiven."""
    return text.strip().rstrip(".").lower() == item["answer"].lower()


_GRADERS = {  # one for each of KINDS
    "facts": grade_fact,
    "mc": lambda item, text: chosen_letter(text) == item["answer"],
    "math": grade_number,
    "count": grade_number,
    "spell": grade_spelling,
    "chat": grade_fact,
}


def grade(item: dict[str, Any], text: str) -> bool:
    """Whether the final text of a reply answers an exam item or a problem."""
    return _GRADERS[item["kind"]](item, text)


class WorldTask:
    """One exam as a task (see `evals.tasks.base`)."""

    def __init__(self, world: World, name: str) -> None:
        assert name in EXAMS, name
        self.name = name
        self.kind: Literal["reply", "generate"] = "reply" if name == "world_mc" else "generate"
        self.world = world
        self.chance = 0.25 if name == "world_mc" else 0.0
        self.max_new_tokens = 96 if name == "world_math" else 64

    def items(self) -> list[dict[str, Any]]:
        return self.world.exam(self.name)

    def grade(self, item: dict[str, Any], text: str) -> bool:
        return grade(item, text)


def find_world_tasks(world: World, names: tuple[str, ...] | None) -> list[WorldTask]:
    """The exams of a world, all or those named."""
    return [WorldTask(world, name) for name in EXAMS if names is None or name in names]
