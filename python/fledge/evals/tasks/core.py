"""A CORE task as an exam beside the others: its name, its rows, and what they are called.

Scored by `evals.core_exam`, not by `examine`: its prompts are plain text, not conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fledge.data.task_files import TaskData
from fledge.evals.core import CORE_TASKS, CoreTask, load_rows, place
from fledge.evals.tasks.base import Item

CORE = "core"  # all 22; one of them is core/NAME


class CoreExam:
    """One of the 22 with its rows."""

    kind: Literal["core"] = "core"
    max_new_tokens = 0

    def __init__(
        self, task: CoreTask, rows: Sequence[Mapping[str, Any]], sha256: str | None
    ) -> None:
        self.name = f"{CORE}/{task.name}"
        self.chance = 0.01 * task.baseline_v1
        self.task = task
        self.rows = rows
        self.sha256 = sha256

    def items(self) -> list[Item]:
        """One (empty) item for each row: only their number is of use outside."""
        return [{} for _ in self.rows]

    def grade(self, item: Item, text: str) -> bool:
        raise AssertionError("CORE tasks are scored by likelihood")


def find_core(
    data: TaskData, names: Sequence[str] | None = None
) -> tuple[list[CoreExam], list[str]]:
    """(exams, sentences on what is missing) of the named CORE tasks (bare names); None = all 22."""
    found, notes = [], []
    for task in CORE_TASKS:
        if names is not None and task.name not in names:
            continue
        rows = load_rows(task, data)
        if isinstance(rows, str):
            notes.append(f"{CORE}/{task.name} is left out: {rows}")
        else:
            found.append(CoreExam(task, rows, data.sha256(place(task, data))))
    return found, notes
