"""A pass of the model over a flat batch of tokens: pieces in, logits out.

`Runner` is the readable way, through the live module, and works for every model that understands
a `CacheView`. Used by `engine.scheduler`; knows nothing of requests.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fledge.model import Transformer
from fledge.model.kv_cache import AttentionView, CacheView, KVCache, Piece

DECODE_BUCKET = 32  # rows in one decode pass of a deterministic engine


class MaskedView(AttentionView, Protocol):
    """A view of a batch [B, T] of rows that see only themselves."""

    mask: Tensor
    """[B, 1, T, T] bool: who sees whom."""


class Runner:
    """Runs the live module; its weights are whatever they are when a pass begins."""

    cache: KVCache  # set before the first `prefill`; scoring needs none

    def __init__(self, model: Transformer, *, deterministic: bool) -> None:
        self.model = model
        self.deterministic = deterministic

    def weights_changed(self) -> None:
        """The module's weights are read at every pass: nothing to do here."""

    def hidden_of(self, ids: Tensor) -> Tensor:
        """Normed states [B, T, D] of a padded batch [B, T], nothing kept."""
        return self.model.hidden(ids)

    def states_at(self, ids: Tensor, view: MaskedView | None, places: Tensor) -> Tensor:
        """Normed states [P, D] at places [P] (ascending, of B x T) of a padded batch [B, T].

        `view` says who sees whom; None: every token sees those before it.
        """
        return self.model.hidden(ids, view).flatten(0, 1)[places]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of normed states [N, D]."""
        return self.model.lm_head(hidden)

    def token_logprobs(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Log-probability [B, T] of every target; the logits of one row at a time."""
        lines = []
        for states, wanted in zip(self.hidden_of(ids), targets, strict=True):
            logits = self.head(states).float()
            lines.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1))
        return torch.stack(lines)

    def prefill(
        self, parts: list[list[int]], pieces: list[Piece], ends: list[int], total: int | None
    ) -> Tensor:
        """Reads the tokens of all pieces; logits [len(ends), V] after the pieces named by `ends`.

        Only those positions meet the head. `total`: padded to so many tokens.
        """
        last, at = [], -1
        for piece in pieces:
            at += piece.count
            last.append(at)
        hidden = self._hidden([token for part in parts for token in part], pieces, total)
        return self._logits(hidden, [last[i] for i in ends])

    def decode(self, tokens: list[int], pieces: list[Piece]) -> Tensor:
        """Reads one token of every piece; logits [rows, V], which hold until the next call."""
        if not self.deterministic:
            return self._logits(self._hidden(tokens, pieces, None), [*range(len(pieces))])
        logits = []
        for first in range(0, len(pieces), DECODE_BUCKET):
            part = pieces[first : first + DECODE_BUCKET]
            hidden = self._hidden(tokens[first : first + DECODE_BUCKET], part, DECODE_BUCKET)
            logits.append(self.head(hidden)[: len(part)])
        return torch.cat(logits)

    def _hidden(self, tokens: list[int], pieces: list[Piece], total: int | None) -> Tensor:
        tokens = tokens + [0] * ((total or len(tokens)) - len(tokens))
        view = CacheView(self.cache, pieces, total)
        ids = torch.tensor([tokens], device=view.positions.device)
        return self.model.hidden(ids, view)[0]

    def _logits(self, hidden: Tensor, places: list[int]) -> Tensor:
        if not self.deterministic:
            return self.head(hidden[places])
        logits = []
        for first in range(0, len(places), DECODE_BUCKET):
            part = places[first : first + DECODE_BUCKET]
            padded = part + [0] * (DECODE_BUCKET - len(part))
            logits.append(self.head(hidden[padded])[: len(part)])
        return torch.cat(logits) if logits else hidden.new_zeros(0, 0)
