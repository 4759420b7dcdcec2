"""Batches of packed rows for the training loop, resumable to the row.

`Loader` turns a `Documents` source (anything with `piece(i)`: ids and loss mask of document i of an
endless, deterministic order) into batches of inputs, targets and weights; `Ahead` makes them while
the model computes. The global order depends on documents only, never on batch size or world size.
Used by `stages`; consumed by `train.loop`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import Any, Protocol

import numpy as np

from fledge.data.pack import Packer, Piece


class Documents(Protocol):
    """An endless deterministic sequence of tokenised documents."""

    def piece(self, index: int) -> Piece:
        """Token ids [n] and loss mask [n] of document `index`."""
        ...


COUNTED: tuple[str, ...] = ("read", "shortened", "dropped", "untrained")
"""What is counted of conversations: all that were read; those that lost whole turns to fit; those
of which nothing fits; those without a token to train on."""


class Batches(Protocol):
    """What a training loop reads: `Loader`, or `Ahead` of one."""

    def batch(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [rows, T + 1] int64 and mask [rows, T + 1] uint8 (mask 1 = train on this token)."""
        ...


class Loader:
    """Batches of `rows` rows; the state is the packer's."""

    def __init__(self, documents: Documents, *, row_tokens: int, pad_id: int, split: bool) -> None:
        # one token more than the context: inputs are row[:-1], targets row[1:]
        self.packer = Packer(documents.piece, row_tokens + 1, pad_id, split)
        self._documents = documents
        self.padded = 0
        self.total = 0

    def batch(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [rows, T + 1] int64 and mask [rows, T + 1] uint8 (mask 1 = train on this token)."""
        picked = [self.packer.row() for _ in range(rows)]
        ids = np.stack([p[0] for p in picked])
        mask = np.stack([p[1] for p in picked])
        self.padded += int((ids == self.packer.pad_id).sum())
        self.total += ids.size
        return ids, mask

    def state(self) -> dict:
        tables = [dict(table) for table in self.counts()]
        counted = {"padded": self.padded, "total": self.total, "conversations": tables}
        return self.packer.state() | counted

    def restore(self, state: dict) -> None:
        # first: fetching again what waits must not count again
        for table, kept in zip(self.counts(), state.get("conversations", ()), strict=False):
            table.update(kept)
        self.packer.restore(state)
        self.padded, self.total = state["padded"], state["total"]

    def counts(self) -> list[dict[str, int]]:
        """What became of the conversations of every source that counts them (see COUNTED)."""
        sources = getattr(self._documents, "sources", [self._documents])
        return [source.counts for source in sources if hasattr(source, "counts")]


class Ahead:
    """A loader whose next batches are packed in a background thread while the model computes.

    The batches, and `state()` after each, are those of the loader itself: what was packed ahead and
    not handed out yet is not part of the state. A context manager; the loader is not to be used by
    others meanwhile. An error of the loader is raised by the `batch` that would have met it.
    """

    def __init__(self, loader: Loader, rows: int, *, batches: int = 2) -> None:
        self._loader, self._rows = loader, rows
        self._state: dict = {}
        self._ready: queue.Queue[tuple[np.ndarray, np.ndarray, dict] | BaseException]
        self._ready = queue.Queue(batches)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)

    def _work(self) -> None:
        made: Any = None
        while not self._closing.is_set() and not isinstance(made, BaseException):
            try:
                made = (*self._loader.batch(self._rows), self._loader.state())
            except BaseException as error:  # handed on: the training thread raises it
                made = error
            while not self._closing.is_set():
                with contextlib.suppress(queue.Full):
                    self._ready.put(made, timeout=0.1)
                    break

    def batch(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Loader.batch`; `rows` is the number that was given at the start."""
        assert rows == self._rows, (rows, self._rows)
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        ids, mask, self._state = made
        return ids, mask

    def state(self) -> dict:
        """The loader's state after the last batch that was handed out."""
        return self._state

    def __enter__(self) -> Ahead:
        self._state = self._loader.state()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()


class Mixture:
    """Several endless sources interleaved by weight; itself a `Documents`.

    Which source gives document i is a fixed low-discrepancy schedule (largest deficit first), so a
    mixture needs no random state and any prefix holds the right shares. `schedule_length` documents
    are planned ahead and the plan repeats.
    """

    def __init__(self, sources: list[Documents], weights: list[float]) -> None:
        assert len(sources) == len(weights) and all(w > 0 for w in weights), weights
        self.sources = sources
        total = sum(weights)
        shares = [w / total for w in weights]
        self.plan, counts = [], [0] * len(sources)
        for step in range(1, 1001):
            pick = max(range(len(sources)), key=lambda s: shares[s] * step - counts[s])
            self.plan.append((pick, counts[pick]))
            counts[pick] += 1
        self.counts = counts

    def locate(self, index: int) -> tuple[int, int]:
        """(source, index inside that source) of document `index`."""
        lap, place = divmod(index, len(self.plan))
        source, offset = self.plan[place]
        return source, lap * self.counts[source] + offset

    def piece(self, index: int) -> Piece:
        source, offset = self.locate(index)
        return self.sources[source].piece(offset)
