"""From a request's fields to the engine's `SamplingParams`, checked against the model.

Called by both completion handlers. Defaults are OpenAI's (temperature 1, one choice, a fresh seed).
"""

from __future__ import annotations

import secrets

from fledge.engine.requests import SamplingParams
from fledge.serve.api_errors import bad_value, context_overflow
from fledge.serve.models import ServedModel
from fledge.serve.schema import Sampling

BAN = -100.0  # OpenAI's bias that keeps a token from being chosen


def sampling_params(
    request: Sampling,
    model: ServedModel,
    *,
    max_tokens: int,
    top_logprobs: int | None,
    banned: tuple[int, ...] = (),
) -> SamplingParams:
    """How the engine continues the prompts of `request`; ApiError names a wrong field.

    `top_logprobs` None means that nobody asked for any, which saves the engine a pass.
    """
    bias = dict.fromkeys(banned, BAN)
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit()) or int(key) >= model.tokenizer.vocab_size:
            raise bad_value(
                "logit_bias",
                f"logit_bias: {key[:40]!r} is no token id below {model.tokenizer.vocab_size}.",
            )
        bias[int(key)] = value
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k if request.top_k is not None and request.top_k > 0 else None,
        top_p=request.top_p,
        min_p=request.min_p or None,
        repetition_penalty=request.repetition_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        dry_multiplier=request.dry_multiplier or 0.0,
        logit_bias=bias,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        n=request.n or 1,
        ignore_eos=request.ignore_eos,
        logprobs=top_logprobs is not None,
        top_logprobs=top_logprobs or 0,
    )


def room_for(prompt: list[int], model: ServedModel, asked: int | None, *, param: str) -> int:
    """How many tokens may be generated after `prompt`: what was asked, or what still fits."""
    room = model.context - len(prompt)
    if room < 1:
        raise context_overflow(model.context, len(prompt), param)
    return room if asked is None else min(asked, room)
