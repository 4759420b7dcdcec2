"""Problems of the user's own for reinforcement: a JSONL file, one problem a line.

    {"question": "What is 2 + 2?", "answer": "4"}
    {"question": "Write f(n), which doubles n.", "tests": "assert f(2) == 4"}

"messages" (OpenAI's shape, ending with the user) may stand for "question". What else a line holds
reaches the rewards as it is. Called by `stages.material`; it judges no answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge.data.conversations import Conversations, Split, split_rows, user
from fledge.data.task_files import JsonRows, require_rows
from fledge.data.text_files import find_files, json_lines
from fledge.errors import UserError


def read_problems(path: str | Path) -> JsonRows:
    """All problems of a file; UserError that names the first line that is none."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}", "rl.files names it", "mind the spelling")
    (file,), _ = find_files(path)
    rows = JsonRows.of(row for _, row in json_lines(file))
    if not rows:
        raise UserError(f"{path} holds no problem", "the file has no lines", "add some")
    require_rows(rows, (), where=str(path), check=_problem_of)
    return rows


def _problem_of(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row.get("question"), str):
        messages = row.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if not isinstance(last, Mapping) or last.get("role") != "user":
            return "it has neither 'question' (text) nor 'messages' that end with the user's"
    if not isinstance(row.get("answer"), (str, int, float)) and not isinstance(
        row.get("tests"), str
    ):
        return "it has neither 'answer' (text or a number) nor 'tests' (Python)"
    return None


def problems_of(rows: Sequence[Mapping[str, Any]], split: Split) -> Sequence[dict[str, Any]]:
    """The problems of a split, shuffled; with a single row both splits are that row."""
    picked = split_rows(len(rows), split)
    return Conversations(rows, _problem, "rl", picked)


def _problem(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "messages": row.get("messages") or [user(row["question"])]}
