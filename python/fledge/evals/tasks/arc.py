"""ARC-Easy and ARC-Challenge: school science, three to five choices, by letter (see `choices`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fledge.evals.tasks.choices import LetterTask


def arc(level: Literal["easy", "challenge"], rows: Sequence[Mapping[str, Any]]) -> LetterTask:
    """The task of ARC's test rows {id, question, choices, gold (index)} of one level."""
    return LetterTask(f"arc_{level}", rows, key="id")
