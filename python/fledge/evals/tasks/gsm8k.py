"""GSM8K: grade-school word problems, answered with the python tool, graded on the final number.

The prompt is the question as user turn, zero-shot. The answer is the number after the first "####",
else the last number of the reply; thousands separators do not count and 18.0 equals 18. Data:
openai/grade-school-math, test split, 1,319 items. Examined by `evals.scoring`; `answer_of` is the
extractor that rewards use too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from fledge.data.conversations import gsm8k_problem
from fledge.evals.tasks.base import Item
from fledge.tokenizer.reply import last_number

_MARKED = re.compile(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")


class Gsm8k:
    """The test items of GSM8K."""

    name = "gsm8k"
    kind: Literal["generate", "choice"] = "generate"
    chance = 0.0
    max_new_tokens = 320  # 99 % of the training solutions are under 750 characters

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows

    def items(self) -> list[Item]:
        """{"id", "messages", "answer": the number as text}."""
        return [
            {**gsm8k_problem(row), "id": f"{self.name}/{i}"} for i, row in enumerate(self._rows)
        ]

    def grade(self, item: Item, text: str) -> bool:
        """Whether the reply's number is the item's."""
        return same_number(answer_of(text), item["answer"])


def answer_of(text: str) -> str | None:
    """The number after the first "####", else the last number, without separators; None if none."""
    marked = _MARKED.search(text)
    return marked.group(1).replace(",", "") if marked else last_number(text)


def same_number(a: str | None, b: str | None) -> bool:
    """Whether two texts name one number: "18.0" and "18"; False where either is none."""
    try:
        return a is not None and b is not None and Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False
