"""Midtraining: the model learns the shape of dialogue, multiple choice and tool use."""

from __future__ import annotations

from fledge.stages.chats import run_chats
from fledge.stages.context import StageContext


def run(ctx: StageContext, *, resume: bool) -> None:
    """Trains base's model on mid's mixture of conversations."""
    run_chats(ctx, "mid", resume=resume)
