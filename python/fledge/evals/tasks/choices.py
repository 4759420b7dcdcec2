"""Multiple choice by letter: the shape that MMLU and ARC share.

The prompt lists each choice with its letter after it (nanochat's chat format); the model's answer
is the likeliest of the item's letters right after <|assistant_start|>. `mmlu` and `arc` say which
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fledge.data.conversations import LETTERS, choice_question, mc_parts, user
from fledge.evals.tasks.base import Item


class LetterTask:
    """Questions whose answer is a letter; `key` is the field that tells a row's group or id."""

    kind: Literal["generate", "choice"] = "choice"
    max_new_tokens = 1

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]], *, key: str) -> None:
        self.name = name
        self._rows = rows
        self._key = key
        sizes = [len(row["choices"]) for row in rows]
        self.chance = sum(1 / size for size in sizes) / len(sizes) if sizes else 0.0

    def items(self) -> list[Item]:
        """{"id", "messages", "answer": letter, "letters": those of the choices}."""
        return [self._item(i, row) for i, row in enumerate(self._rows)]

    def grade(self, item: Item, text: str) -> bool:
        """Whether the reply is the right letter."""
        return text.strip() == item["answer"]

    def _item(self, i: int, row: Mapping[str, Any]) -> Item:
        question, choices, gold = mc_parts(row)
        return {
            "id": f"{self.name}/{i}/{row.get(self._key, '')}",
            "messages": [user(choice_question(question, choices))],
            "answer": LETTERS[gold],
            "letters": list(LETTERS[: len(choices)]),
        }
