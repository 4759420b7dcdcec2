"""Choosing the next token of every row of a batch.

A draw depends only on (seed, choice, position) and on the row's own logits: one uniform number per
row comes from a counter-based generator, so batch-mates never change a sample. Used by
`engine.scheduler`. Pure functions of tensors [rows, V].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. temperature 0 is greedy; n samples share one prefill."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1 and self.temperature >= 0 and self.n >= 1, self
        assert self.top_k is None or self.top_k >= 1, self
        assert self.top_p is None or 0 < self.top_p <= 1, self


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its three keys.

    SplitMix64's finaliser (Steele, Lea and Flood 2014) over the mixed keys.
    """
    x = (seed * 0x9E3779B97F4A7C15 + choice * 0xBF58476D1CE4E5B9 + position) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / (1 << 53)


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """Token ids [rows] from logits [rows, V] and one uniform number per row [rows]."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits.float() / params.temperature).softmax(dim=-1)
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        least = probabilities.topk(params.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if params.top_p is not None and params.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= params.top_p * ordered.sum(-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    # inverse of the cumulative distribution, in float64 so that the tail keeps its mass
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniforms.double()[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return picked.clamp_(max=logits.shape[-1] - 1)
