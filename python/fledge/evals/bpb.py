"""Bits per byte on a fixed set of packed validation rows: the loss that no vocabulary can flatter.

bpb = sum of nats of the scored tokens / (ln 2 x their bytes), summed in float64. Special tokens
have no bytes and are not scored. Rows are packed, so a document that continues in a further row
loses its earlier context there; that is part of the number. Called by stages through the trainer's
eval hook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fledge.data.loader import Loader
from fledge.model import Transformer
from fledge.tokenizer import Tokenizer


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


def measure(
    model: Transformer,
    validation: ValidationSet,
    byte_counts: Tensor,
    *,
    device_batch_size: int,
) -> Losses:
    """Losses of the tokens that are trained on (mask 1) and that have bytes."""
    was_training = model.training
    model.eval()
    device = model.cos.device
    byte_counts = byte_counts.to(device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = total_bytes = 0
    for at in range(0, len(validation.ids), device_batch_size):
        ids = torch.from_numpy(validation.ids[at : at + device_batch_size]).to(device)
        mask = torch.from_numpy(validation.mask[at : at + device_batch_size]).to(device)[:, 1:]
        targets = ids[:, 1:]
        sizes = byte_counts[targets] * mask
        scored = sizes > 0
        losses = model.token_losses(ids[:, :-1], targets)
        nats += losses.double()[scored].sum()
        tokens += int(scored.sum())
        total_bytes += int(sizes.sum())
    model.train(was_training)
    return Losses(float(nats), tokens, total_bytes)
