"""What the engine is asked and what it says: sampling parameters, requests, events.

Data only, checked on construction, so that whoever adds a request (chat, server, evaluation,
reinforcement) learns of a mistake before anything runs. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fledge.engine.tools import Tools
from fledge.errors import UserError

MAX_TOP_LOGPROBS = 100

# Which tokens may come next, given the tokens so far (None = all): grammars and JSON modes.
AllowedTokens = Sequence[int] | Callable[[list[int]], Sequence[int] | None]


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; n samples share one prefill.

    Order of work: penalties and `logit_bias` on the raw logits, then `allowed_tokens`,
    temperature, top_k, top_p, min_p, the draw. repetition_penalty divides positive and multiplies
    negative logits of every token seen, prompt included (Keskar et al., arXiv 1909.05858, as
    transformers does it); presence and frequency penalties count generated tokens only (OpenAI).
    dry_multiplier (0 = off) is against going round in circles (after "DRY", p-e-w 2024): a token
    that would go on with a run of n >= 3 tokens said before, both behind the last special token,
    loses multiplier x 1.75^(n-3).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_tokens: AllowedTokens | None = None
    seed: int = 0
    n: int = 1
    stop_token_ids: Sequence[int] = ()  # besides the model's own end tokens
    ignore_eos: bool = False  # the model's own end tokens do not end the answer
    logprobs: bool = True  # False: events carry 0.0, and a pass over the vocabulary is saved
    logprobs_at_temperature: bool = False  # the log-probabilities of the draw, for reinforcement
    top_logprobs: int = 0  # how many alternatives each token event lists

    def __post_init__(self) -> None:
        bounds = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "presence_penalty": (abs(self.presence_penalty) <= 100, "from -100 to 100"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "from -100 to 100"),
            "dry_multiplier": (0 <= self.dry_multiplier <= 100, "from 0 to 100"),
            "logit_bias": (
                all(abs(b) <= 1e4 for b in self.logit_bias.values()),
                "numbers from -10000 to 10000",
            ),
            "n": (self.n >= 1, "at least 1"),
            "top_logprobs": (
                0 <= self.top_logprobs <= (MAX_TOP_LOGPROBS if self.logprobs else 0),
                "from 0 to 100, and 0 without logprobs",
            ),
        }
        for name, (good, wanted) in bounds.items():
            if not good:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} is not possible",
                    f"{name} must be {wanted}",
                    f"change {name}",
                )

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.dry_multiplier != 0
        )

    @property
    def plain(self) -> bool:
        """Nothing changes the logits before the temperature."""
        return not (self.has_penalties or self.logit_bias or self.allowed_tokens is not None)


@dataclass(frozen=True)
class Request:
    """A prompt to be continued `params.n` times, with tools or without."""

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    tools: Tools | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one choice of a request.

    `logprob` and `top_logprobs` (id, log-probability; best first) are of the model itself: before
    penalties and temperature (`logprob` at the temperature under `logprobs_at_temperature`).
    `sampled` is False for tokens that a tool put in. The last event of a choice has a
    `finish_reason`: "stop", "length" or "cancelled"; a cancelled choice ends with an event whose
    token is -1, for no token came.
    """

    request_id: int
    choice: int
    token: int
    logprob: float
    top_logprobs: list[tuple[int, float]]
    sampled: bool
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """One continuation: ids, their log-probabilities, which were sampled (not forced by a tool)."""

    ids: list[int]
    logprobs: list[float]
    sampled_mask: list[bool]
    finish_reason: str  # "stop" or "length"
