"""Best-fit packing: variable-length documents into rows of exactly `row_tokens` tokens.

A row holds whole documents where they fit; a document longer than a row continues in further rows
(text) or has been windowed before (conversations); nothing is thrown away. Used by `data.loader`.
Pure Python and numpy; deterministic: the rows are a function of the order of the documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Piece = tuple[np.ndarray, np.ndarray]  # token ids, loss mask: both [n], int32 and uint8

BUFFER_PIECES = 256  # how many waiting pieces best-fit may choose from


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

    def _length(self, entry: tuple[int, int]) -> int:
        return len(self._piece(entry[0])[0]) - entry[1]

    def _piece(self, document: int) -> Piece:
        if document not in self._pieces:
            self._pieces[document] = self.fetch(document)
        return self._pieces[document]

    def _refill(self) -> None:
        while len(self.buffer) < BUFFER_PIECES:
            ids, _ = self._piece(self.cursor)
            assert self.split or len(ids) <= self.row_tokens, (len(ids), self.row_tokens)
            if len(ids):
                self.buffer.append((self.cursor, 0))
            self.cursor += 1

    def _best_fit(self, room: int) -> int | None:
        """Index of the longest waiting piece that fits; of equal ones the first."""
        best, best_length = None, 0
        for index, entry in enumerate(self.buffer):
            length = self._length(entry)
            if best_length < length <= room:
                best, best_length = index, length
        return best

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
                index = max(range(len(self.buffer)), key=lambda i: self._length(self.buffer[i]))
            document, start = self.buffer.pop(index)
            piece_ids, piece_mask = self._piece(document)
            take = min(room, len(piece_ids) - start)
            ids[used : used + take] = piece_ids[start : start + take]
            mask[used : used + take] = piece_mask[start : start + take]
            used += take
            if start + take < len(piece_ids):
                self.buffer.insert(0, (document, start + take))
            else:
                del self._pieces[document]
        return ids, mask

    def state(self) -> dict:
        """JSON-able; `restore` continues with exactly the same rows."""
        return {"cursor": self.cursor, "buffer": [list(entry) for entry in self.buffer]}

    def restore(self, state: dict) -> None:
        self.cursor = state["cursor"]
        self.buffer = [(document, start) for document, start in state["buffer"]]
        self._pieces = {}
