"""Bits per byte of unseen text: the loss that no vocabulary can flatter, in two modes.

bpb = sum of nats of the scored tokens / (ln 2 x their bytes), summed in float64. Special tokens
have no bytes and are not scored. `measure` reads packed rows, quickly and often during training: a
document that continues in a further row loses its earlier context there, which is part of the
number. `full_documents` scores every byte of every document once, behind <|bos|>, with at least
half a context before it: comparable with lm-eval's bits_per_byte. Called by stages through the
trainer's eval hook, and by `fledge eval --bpb`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fledge.data.loader import Loader
from fledge.dist import World
from fledge.engine import Engine
from fledge.evals.scoring import Request, loglikelihood
from fledge.model import Transformer
from fledge.tokenizer import Tokenizer

WINDOWS = 512  # of full documents, scored together


def token_byte_counts(tokenizer: Tokenizer) -> Tensor:
    """Bytes of every token id, [V] int64; 0 for special and padding ids."""
    return torch.tensor([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])


@dataclass(frozen=True)
class ValidationSet:
    """Rows that stay the same through a run: ids and masks [rows, T + 1]."""

    ids: np.ndarray
    mask: np.ndarray

    @classmethod
    def take(cls, loader: Loader, tokens: int) -> ValidationSet:
        """The first rows of a loader, at least `tokens` tokens."""
        rows = max(1, -(-tokens // (loader.packer.row_tokens - 1)))
        return cls(*loader.batch(rows))


@dataclass(frozen=True)
class Losses:
    """Sums over the scored tokens of a validation set."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bpb(self) -> float:
        return self.nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def loss(self) -> float:
        """Mean nats per scored token."""
        return self.nats / self.tokens if self.tokens else math.nan


def full_documents(engine: Engine, texts: Iterable[str]) -> Losses:
    """Losses of whole documents; windows of one context slide by half of it.

    A document's first token stands behind bos; empty documents count nothing.
    """
    counts = [len(engine.tokenizer.token_bytes(i)) for i in range(engine.tokenizer.vocab_size)]
    nats, tokens, size = [], 0, 0
    for group in _groups(_windows(engine, texts)):
        for request, found in zip(group, loglikelihood(engine, group), strict=True):
            nats.append(-found.total)
            tokens += len(found.logprobs)
            size += sum(counts[i] for i in request.ids[request.start :])
    return Losses(math.fsum(nats), tokens, size)


def _groups(requests: Iterator[Request]) -> Iterator[list[Request]]:
    while group := list(itertools.islice(requests, WINDOWS)):
        yield group


def _windows(engine: Engine, texts: Iterable[str]) -> Iterator[Request]:
    """Every token of every document once, each with what fits before it."""
    limit = engine.model.config.max_position_embeddings
    for text in texts:
        ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(text)]
        scored = 1  # up to where the document is done
        while scored < len(ids):
            begin = max(0, scored - limit // 2) if scored > 1 else 0
            window = ids[begin : begin + limit]
            yield Request(window, scored - begin)
            scored = begin + len(window)


def measure(
    model: Transformer,
    validation: ValidationSet,
    byte_counts: Tensor,
    *,
    device_batch_size: int,
    world: World | None = None,
) -> Losses:
    """Losses of the tokens that are trained on (mask 1) and that have bytes.

    Of several ranks each takes its share of the rows; all get the whole.
    """
    world = world or World()
    share = world.share(len(validation.ids))
    was_training = model.training
    model.eval()
    device = model.cos.device
    byte_counts = byte_counts.to(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = total_bytes = 0
    for at in range(share.start, share.stop, device_batch_size):
        rows = slice(at, min(at + device_batch_size, share.stop))
        ids = torch.from_numpy(validation.ids[rows]).to(device)
        mask = torch.from_numpy(validation.mask[rows]).to(device)[:, 1:]
        targets = ids[:, 1:]
        sizes = byte_counts[targets] * mask
        scored = sizes > 0
        losses = model.token_losses(ids[:, :-1], targets)
        nats += losses.double()[scored].sum()
        tokens += int(scored.sum())
        total_bytes += int(sizes.sum())
    model.train(was_training)
    found = [world.sum_number(float(n), device) for n in (nats, tokens, total_bytes)]
    return Losses(found[0], round(found[1]), round(found[2]))
