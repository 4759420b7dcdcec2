"""Exams of your own: a JSONL file becomes a task, `fledge eval MODEL --tasks FILE.jsonl`.

One question a line, in one of two shapes (all lines of a file alike):

    {"question": "Which is a fruit?", "choices": ["rock", "apple"], "gold": 1}
    {"question": "What is the capital of France?", "answer": "Paris", "accept": ["paris"]}

With choices the model answers by letter, as in MMLU and ARC. Without, it says something, which is
right if the answer (or one of "accept") stands in it as whole words; a number must be the last
number it says. "id" is optional, and unique. `messages` (OpenAI's shape, ending with the user) may
stand for "question". Called by `registry`; it scores nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fledge.data.conversations import user
from fledge.data.task_files import JsonRows, require_rows
from fledge.data.text_files import find_files, json_lines
from fledge.errors import UserError
from fledge.evals.tasks.base import Item, Task
from fledge.evals.tasks.choices import LetterTask
from fledge.evals.tasks.gsm8k import answer_of, same_number

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MOST_CHOICES = 26
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_file_name(name: str) -> bool:
    """Whether a word of --tasks is a file and not the name of a task."""
    return name.endswith(SUFFIXES)


def user_task(path: Path) -> Task:
    """The task of a file; UserError if it is missing, empty or has a line that is no question."""
    if not path.is_file():
        raise UserError(
            f"there is no task file {path}", "--tasks names it", "mind the spelling, or its folder"
        )
    (file,), _ = find_files(path)
    rows = JsonRows.of(row for _, row in json_lines(file))
    with_choices = len(rows) > 0 and "choices" in rows[0]
    if with_choices:
        require_rows(rows, ("question", "choices", "gold"), where=str(path), check=_check_choices)
        return LetterTask(_name(path), rows, key="id")
    require_rows(rows, ("answer",), where=str(path), check=_check_answer)
    return Said(_name(path), rows)


def _name(path: Path) -> str:
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return re.sub(r"[^\w.-]", "_", name)


def _check_choices(row: Mapping[str, Any]) -> str | None:
    choices, gold = row["choices"], row["gold"]
    if not isinstance(row["question"], str):
        return "'question' is not text"
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        return "'choices' is not a list of texts"
    if not 2 <= len(choices) <= MOST_CHOICES:
        return f"'choices' has {len(choices)} entries, not 2 to {MOST_CHOICES}"
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"'gold' is {gold!r}, not an index of 'choices' (from 0)"
    return None


def _check_answer(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row["answer"], str | int | float) or str(row["answer"]).strip() == "":
        return "'answer' is neither text nor a number"
    if "messages" in row:
        last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else {}
        is_asked = isinstance(last, Mapping) and last.get("role") == "user"
        return None if is_asked else "'messages' does not end with a message of the user"
    return (
        None
        if isinstance(row.get("question"), str)
        else "it has neither 'question' (text) nor 'messages'"
    )


class Said:
    """Questions whose answer must stand in what the model says."""

    kind: Literal["generate"] = "generate"
    chance = 0.0
    max_new_tokens = 128

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self._rows = rows

    def items(self) -> list[Item]:
        """{"id", "messages", "answer", "accept"}."""
        return [
            {
                "id": f"{self.name}/{row.get('id', i)}",
                "messages": row.get("messages") or [user(row["question"])],
                "answer": str(row["answer"]).strip(),
                "accept": [str(a) for a in row.get("accept", ())],
            }
            for i, row in enumerate(self._rows)
        ]

    def grade(self, item: Item, text: str) -> bool:
        """Whether the reply holds the answer."""
        if _NUMBER.fullmatch(item["answer"]):
            return same_number(answer_of(text), item["answer"].replace(",", ""))
        said = text.lower()
        return any(
            re.search(rf"(?<!\w){re.escape(phrase.lower())}(?!\w)", said) is not None
            for phrase in (item["answer"], *item["accept"])
        )
