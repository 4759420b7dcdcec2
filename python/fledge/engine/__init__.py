"""Inference: one batched engine for chat, the server, evaluation and reinforcement."""

from fledge.engine.engine import Engine
from fledge.engine.requests import Completion, Request, SamplingParams, TokenEvent
from fledge.engine.text_stream import TextStream

__all__ = ["Completion", "Engine", "Request", "SamplingParams", "TextStream", "TokenEvent"]
