"""Supervised fine-tuning: the model learns to answer the way an assistant should."""

from __future__ import annotations

from fledge.stages.chats import run_chats
from fledge.stages.context import StageContext


def run(ctx: StageContext, *, resume: bool) -> None:
    """Trains mid's model on sft's mixture of conversations."""
    run_chats(ctx, "sft", resume=resume)
