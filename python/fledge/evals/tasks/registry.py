"""Real tasks by name: what can be examined with the files at hand, and a sentence for the rest."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from fledge.data.conversations import held_out_chats
from fledge.data.task_files import TaskData, require_rows
from fledge.errors import UserError
from fledge.evals.core import BY_NAME
from fledge.evals.tasks.arc import arc
from fledge.evals.tasks.base import Task
from fledge.evals.tasks.chat import Chat
from fledge.evals.tasks.core import CORE, find_core
from fledge.evals.tasks.gsm8k import Gsm8k
from fledge.evals.tasks.humaneval import HumanEval
from fledge.evals.tasks.mmlu import mmlu
from fledge.evals.tasks.user import is_file_name, user_task

TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "chat")


def find_tasks(
    root: str | Path | TaskData | None, names: Sequence[str] | None = None
) -> tuple[list[Task], list[str]]:
    """(tasks, sentences on what is missing) of the named real tasks; None means all.

    `root` is data.root (None: FLEDGE_DATA) or an opened TaskData. Raises UserError for a name that
    is no task.
    """
    data = root if isinstance(root, TaskData) else TaskData(root)
    wanted = TASKS if names is None else tuple(names)
    for name in wanted:
        _require_known(name)
    found: list[Task] = []
    notes: list[str] = []
    of_core = [name.removeprefix(CORE + "/") for name in wanted if name.startswith(CORE)]
    if of_core:
        exams, notes = find_core(data, None if CORE in of_core else of_core)
        found.extend(exams)
    for name in wanted:
        if name.startswith(CORE):
            continue
        task = user_task(Path(name)) if is_file_name(name) else _open(name, data)
        if isinstance(task, str):
            notes.append(f"{name} is left out: {task}")
        else:
            found.append(task)
    return found, notes


def _require_known(name: str) -> None:
    """UserError, with the nearest one, for a name that is no task."""
    known = [*TASKS, CORE, *(f"{CORE}/{task}" for task in BY_NAME)]
    if name in known or is_file_name(name):
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise UserError(
        f"there is no task called {name!r}",
        f"the real tasks are {', '.join(TASKS)}, {CORE} (its 22 tasks), {CORE}/NAME (one of them) "
        "and any file of yours that ends in .jsonl",
        f"did you mean {near[0]}?" if near else "choose one of them",
    )


_FIELDS = {
    "arc_easy": ("question", "choices", "gold"),
    "arc_challenge": ("question", "choices", "gold"),
    "mmlu": ("question", "choices", "answer"),
    "gsm8k": ("question", "answer"),
    "humaneval": ("task_id", "prompt", "entry_point", "canonical_solution", "test"),
}
_FILES = {
    "arc_easy": "arc/arc_easy_test",
    "arc_challenge": "arc/arc_challenge_test",
    "mmlu": "mmlu/test",
    "gsm8k": "gsm8k/test",
    "humaneval": "humaneval/HumanEval",
}


def _open(name: str, data: TaskData) -> Task | str:
    """The task, or the sentence why it cannot be examined."""
    if name == "chat":
        chats = held_out_chats(data)
        return Chat(chats) if chats else "there are no chat files (sft/*.jsonl.gz) under data.root"
    rows = data.rows(_FILES[name])
    if rows is None:
        return data.why_missing(_FILES[name])
    require_rows(rows, _FIELDS[name], where=_FILES[name])
    if name == "humaneval":
        task = HumanEval(rows)
        return task.why_unavailable() or task
    if name == "gsm8k":
        return Gsm8k(rows)
    if name == "mmlu":
        return mmlu(rows)
    return arc("easy" if name == "arc_easy" else "challenge", rows)
