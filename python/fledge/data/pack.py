"""Best-fit packing: variable-length documents into rows of exactly `row_tokens` tokens.

A row holds whole documents where they fit; a document longer than a row continues in further rows
(text) or has been windowed before (conversations); nothing is thrown away. Used by `data.loader`.
Pure Python and numpy; deterministic: the rows are a function of the order of the documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fledge.errors import UserError

Piece = tuple[np.ndarray, np.ndarray]  # token ids, loss mask: both [n], int32 and uint8

MOST_EMPTY = 10_000  # documents in a row without a token: nothing is to be expected any more
BUFFER_PIECES = 256  # how many waiting pieces best-fit may choose from
_NO_LENGTHS = np.zeros(BUFFER_PIECES + 1, dtype=np.int64)  # one more: the rest of a cut document


@dataclass
class Packer:
    """Rows out of an endless stream of documents, with a state that a checkpoint can keep.

    `fetch(i)` gives document i of the global order; `cursor` is the next i. `buffer` holds
    (document, start) pairs that wait for a row, so that the whole state is a handful of integers.
    `split` says whether a document may be cut to fill a row exactly; otherwise the rest of the row
    is padding with loss mask 0.
    """

    fetch: Callable[[int], Piece]
    row_tokens: int
    pad_id: int
    split: bool
    cursor: int = 0
    buffer: list[tuple[int, int]] = field(default_factory=list)
    _pieces: dict[int, Piece] = field(default_factory=dict, repr=False)
    # tokens of each piece in `buffer`, in the same order: best-fit looks at all of them at once
    _lengths: np.ndarray = field(default_factory=lambda: _NO_LENGTHS.copy(), repr=False)

    def _piece(self, document: int) -> Piece:
        if document not in self._pieces:
            self._pieces[document] = self.fetch(document)
        return self._pieces[document]

    def _insert(self, place: int, document: int, start: int) -> None:
        waiting = len(self.buffer)
        self._lengths[place + 1 : waiting + 1] = self._lengths[place:waiting].copy()
        self._lengths[place] = len(self._piece(document)[0]) - start
        self.buffer.insert(place, (document, start))

    def _take(self, place: int) -> tuple[int, int]:
        waiting = len(self.buffer)
        self._lengths[place : waiting - 1] = self._lengths[place + 1 : waiting].copy()
        return self.buffer.pop(place)

    def _refill(self) -> None:
        empty = 0
        while len(self.buffer) < BUFFER_PIECES:
            ids, _ = self._piece(self.cursor)
            assert self.split or len(ids) <= self.row_tokens, (len(ids), self.row_tokens)
            if len(ids):
                self._insert(len(self.buffer), self.cursor, 0)
                empty = 0
            else:
                del self._pieces[self.cursor]
                empty += 1
                if empty >= MOST_EMPTY:
                    raise UserError(
                        f"{MOST_EMPTY:,} documents in a row leave nothing to train on",
                        f"not one whole exchange of theirs fits into {self.row_tokens - 1} tokens, "
                        "or none has an assistant's words",
                        "raise model.max_seq_len, or leave that kind out of the mixture",
                    )
            self.cursor += 1

    def _best_fit(self, room: int) -> int | None:
        """Index of the longest waiting piece that fits; of equal ones the first."""
        lengths = self._lengths[: len(self.buffer)]
        fitting = np.where(lengths <= room, lengths, 0)
        best = int(fitting.argmax())
        return best if fitting[best] else None

    def row(self) -> Piece:
        """The next row: ids [row_tokens] int64 and mask [row_tokens] uint8."""
        ids = np.full(self.row_tokens, self.pad_id, dtype=np.int64)
        mask = np.zeros(self.row_tokens, dtype=np.uint8)
        used = 0
        while used < self.row_tokens:
            self._refill()
            room = self.row_tokens - used
            index = self._best_fit(room)
            if index is None:
                if not self.split:
                    break  # only padding is left for this row
                # cut the longest: its rest will fit another row best
                index = int(self._lengths[: len(self.buffer)].argmax())
            document, start = self._take(index)
            piece_ids, piece_mask = self._piece(document)
            take = min(room, len(piece_ids) - start)
            ids[used : used + take] = piece_ids[start : start + take]
            mask[used : used + take] = piece_mask[start : start + take]
            used += take
            if start + take < len(piece_ids):
                self._insert(0, document, start + take)
            else:
                del self._pieces[document]
        return ids, mask

    def state(self) -> dict:
        """JSON-able; `restore` continues with exactly the same rows."""
        return {"cursor": self.cursor, "buffer": [list(entry) for entry in self.buffer]}

    def restore(self, state: dict) -> None:
        self.cursor = state["cursor"]
        self.buffer, self._pieces = [], {}
        for document, start in state["buffer"]:
            self._insert(len(self.buffer), document, start)
