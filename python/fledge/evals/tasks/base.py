"""What a task is: items with prompts and answers, and a rule that grades a reply.

`evals.examine` examines a model on anything of this shape: a "choice" task by the log-probabilities
of letters right after <|assistant_start|>, a "reply" task by those of its items' `replies`, a
"generate" task by a greedy reply with tools; "core" tasks are `evals.core_exam`'s. The real
tasks (gsm8k, mmlu, arc, humaneval, chat) and the worlds' exams all are such objects. This module
holds the shape only; it reads no file and scores nothing.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

Item = dict[str, Any]  # {"id": str, "messages": [...last a user turn], "answer": str, "letters"?}


class Task(Protocol):
    """One exam; the attributes are plain and constant, `items` gives the same list each time."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["generate", "choice", "reply", "core"]: ...

    @property
    def chance(self) -> float:
        """The accuracy of guessing, between 0 and 1."""
        ...

    @property
    def max_new_tokens(self) -> int: ...

    def items(self) -> list[Item]: ...

    def grade(self, item: Item, text: str) -> bool:
        """Whether `text`, what the assistant finally says, answers the item."""
        ...
