"""MMLU: 14,042 four-way questions of 57 subjects, zero-shot, by letter (see `choices`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fledge.evals.tasks.choices import LetterTask


def mmlu(rows: Sequence[Mapping[str, Any]]) -> LetterTask:
    """The task of MMLU's test rows {question, choices, answer (index), subject}."""
    return LetterTask("mmlu", rows, key="subject")
