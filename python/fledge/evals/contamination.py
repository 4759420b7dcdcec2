"""Which of an exam's questions a model may have seen: `data.overlap` applied to our tasks.

Called by `fledge data overlap`. A question is its text together with its right answer, and for
tasks by choice its choices, as far as the exam shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fledge.data.overlap import WORDS, Probe
from fledge.evals.tasks.base import Task
from fledge.evals.tasks.core import CoreExam


def find_overlap(
    texts: Iterable[str], tasks: Sequence[Task], *, words: int = WORDS
) -> dict[str, Any]:
    """{"words", "documents", "bytes", "tasks": {NAME: {"items", "overlapped", "share", ...}}}."""
    probe = Probe(words)
    for task in tasks:
        for item, text in questions(task):
            probe.add(task.name, item, text)
    read = {"documents": 0, "bytes": 0}

    def counted() -> Iterator[str]:
        for text in texts:
            read["documents"] += 1
            read["bytes"] += len(text.encode("utf-8", errors="replace"))
            yield text

    found = probe.search(counted())
    return {"words": words, **read, "tasks": found}


def questions(task: Task | CoreExam) -> Iterator[tuple[str, str]]:
    """(id, text) of every question of a task."""
    if isinstance(task, CoreExam):
        for place, row in enumerate(task.rows):
            yield f"{task.name}/{place}", _core_text(row)
        return
    for item in task.items():
        said = [m["content"] for m in item["messages"] if isinstance(m["content"], str)]
        answer = item["answer"] if task.kind != "choice" else ""  # a letter says nothing
        yield str(item["id"]), "\n".join([*said, str(answer)])


def _core_text(row: Any) -> str:
    if "query" in row:
        return f"{row['query']} {row['choices'][row['gold']]}"
    if "context_options" in row:
        return f"{row['context_options'][row['gold']]} {row['continuation']}"
    return f"{row['context']} {row['continuation']}"
