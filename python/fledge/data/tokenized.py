"""Text and conversations as token pieces: what `data.loader` packs.

Each class is a `Documents`: `piece(i)` gives ids and loss mask of document i of an endless order.
Items come from a callable, so that a world's generator and a list of files look the same here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from fledge.data.loader import COUNTED
from fledge.data.pack import Piece
from fledge.tokenizer import Tokenizer
from fledge.tokenizer.chat import render, window


class TextDocuments:
    """Raw documents: <|bos|> and the text, every token trained on.

    `max_tokens` cuts a document short; only text that is replayed among conversations needs it
    (rows of conversations are never continued in a further row).
    """

    def __init__(
        self, text: Callable[[int], str], tokenizer: Tokenizer, *, max_tokens: int | None = None
    ) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def piece(self, index: int) -> Piece:
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(self.text(index))]
        ids = ids[: self.max_tokens]
        return np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.uint8)


Policy = Literal["start", "end", "drop"]
NOTHING: Piece = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8)


class ConversationDocuments:
    """Conversations with their loss mask; none is ever cropped inside a turn.

    One that is too long keeps its first or last whole exchanges, or is dropped, as `policy` says;
    one of which nothing fits is dropped, and so is one without anything to train on. `counts` says
    how many were read and what became of them: every index once, for indices only ever grow.
    """

    def __init__(
        self,
        conversation: Callable[[int], dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        policy: Policy = "start",
    ) -> None:
        self.conversation = conversation
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.policy: Policy = policy
        self.counts = dict.fromkeys(COUNTED, 0)

    def piece(self, index: int) -> Piece:
        piece, fate = self._piece(self.conversation(index))
        if index >= self.counts["read"]:  # else a resumed loader fetches again what it had waiting
            self.counts["read"] = index + 1
            if fate is not None:
                self.counts[fate] += 1
        return piece

    def _piece(self, conversation: dict[str, Any]) -> tuple[Piece, str | None]:
        ids, mask = render(self.tokenizer, conversation)
        fate = None
        if len(ids) > self.max_tokens:
            kept = None
            if self.policy != "drop":
                kept = window(conversation, self.tokenizer, self.max_tokens, keep=self.policy)
            if kept is None:
                return NOTHING, "dropped"
            fate = "shortened"
            ids, mask = render(self.tokenizer, kept)
        if not any(mask):
            return NOTHING, "untrained"
        return (np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)), fate


class Epochs:
    """A finite sequence as an endless one, shuffled anew every epoch by a seed."""

    def __init__(self, items: Sequence[Any], seed: int) -> None:
        assert len(items) > 0
        self.items = items
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, index: int) -> Any:
        epoch, place = divmod(index, len(self.items))
        if epoch != self._epoch:
            self._order = list(range(len(self.items)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self.items[self._order[place]]
