"""Inference: one batched engine for chat, evaluation and reinforcement."""

from fledge.engine.engine import Completion, Engine
from fledge.engine.sampling import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams"]
