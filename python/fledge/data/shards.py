"""A corpus that memory does not hold: Parquet shards, read in a seeded order, one at a time.

`ShardedTexts` is an endless callable sequence of documents: `texts(i)` is document i. Every epoch
but the first goes through the shards in an order of its own; inside a shard `WINDOW_GROUPS` row
groups are mixed at a time, so memory holds a few thousand documents and nothing else. A shard is
asked for when the order reaches it, and the one after it is fetched meanwhile: it may still lie on
the hub.
`ShardWriter` brings any stream of documents into this form. Used by `data.sources`; it never
touches the network itself and never imports torch.
"""

from __future__ import annotations

import bisect
import contextlib
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from fledge.data.text_files import text_column
from fledge.errors import UserError

WINDOW_GROUPS = 8  # row groups whose documents are mixed with each other
KEPT = 3  # windows and visits in memory: the one being read, and those where cut documents go on
GROUP_DOCUMENTS = 1024  # documents of a row group, as in nanochat's shards


@dataclass(frozen=True)
class Shard:
    """One Parquet file; `path()` gives it, fetching it first if need be."""

    name: str
    path: Callable[[], Path]


def local_shards(folder: Path) -> list[Shard]:
    """The Parquet files of a folder, by name."""
    return [Shard(p.name, lambda p=p: p) for p in sorted(folder.glob("*.parquet"))]


@dataclass(frozen=True)
class _Visit:
    """One reading of a shard: its row groups in a shuffled order, and where windows of them end."""

    path: Path
    groups: list[int]
    window_ends: list[int]  # documents up to the end of each window


class ShardedTexts:
    """Documents of Parquet shards, shuffled anew every epoch; `texts(index)` gives one.

    The order depends on the shards, their row groups and the seed alone. Reading goes forwards; an
    earlier document is found again as long as its shard can be had. One thread at a time.
    """

    def __init__(self, shards: list[Shard], seed: int) -> None:
        assert shards
        self.shards = shards
        self.seed = seed
        self._starts = [0]  # first document of each visit so far, and the first of the next
        self._visits: OrderedDict[int, _Visit] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], list[str]] = OrderedDict()
        self._sizes: dict[str, list[int]] = {}  # shard -> documents of each row group
        self._fetching: tuple[int, threading.Thread] | None = None

    def __call__(self, index: int) -> str:
        while index >= self._starts[-1]:
            self._extend()
        visit = bisect.bisect_right(self._starts, index) - 1
        place = index - self._starts[visit]
        ends = self._visit(visit).window_ends
        window = bisect.bisect_right(ends, place)
        return self._window(visit, window)[place - (ends[window - 1] if window else 0)]

    def passes(self, documents: int) -> float:
        """How often the shards were gone through when so many documents were read; shards count
        alike, for those that were not reached are not opened."""
        while documents >= self._starts[-1]:
            self._extend()
        visit = bisect.bisect_right(self._starts, documents) - 1
        whole = self._starts[visit + 1] - self._starts[visit]
        return (visit + (documents - self._starts[visit]) / whole) / len(self.shards)

    def one_epoch(self) -> Iterator[str]:
        """Every document once, in the order of the first epoch."""
        index = 0
        while len(self._starts) <= len(self.shards) or index < self._starts[len(self.shards)]:
            if index == self._starts[-1]:
                self._extend()
                continue
            yield self(index)
            index += 1

    def _extend(self) -> None:
        visit = len(self._starts) - 1
        documents = sum(self._row_groups(visit))
        self._starts.append(self._starts[-1] + documents)
        if visit + 1 >= len(self.shards) and not self._starts[-1]:
            raise UserError(
                "the shards hold no document",
                f"{len(self.shards)} Parquet files without a row",
                "name another data.source",
            )

    def _shard(self, visit: int) -> Shard:
        """The first epoch takes the shards by name, so that a person can fetch them beforehand."""
        epoch, place = divmod(visit, len(self.shards))
        order = list(range(len(self.shards)))
        if epoch:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return self.shards[order[place]]

    def _row_groups(self, visit: int) -> list[int]:
        """Documents of each row group of the visit's shard."""
        name = self._shard(visit).name
        if name not in self._sizes:
            with _open(self._path(visit)) as table:
                meta = table.metadata
                self._sizes[name] = [
                    meta.row_group(g).num_rows for g in range(table.num_row_groups)
                ]
        return self._sizes[name]

    def _path(self, visit: int) -> Path:
        """The file of a visit; the one after it is fetched in the background."""
        if self._fetching and self._fetching[0] == visit:
            self._fetching[1].join()
        path = self._shard(visit).path()  # there already, or tried again and its error told
        if not self._fetching or self._fetching[0] <= visit:
            fetch = threading.Thread(target=_quietly, args=[self._shard(visit + 1)], daemon=True)
            self._fetching = visit + 1, fetch
            fetch.start()
        return path

    def _visit(self, visit: int) -> _Visit:
        def make() -> _Visit:
            sizes = self._row_groups(visit)
            groups = list(range(len(sizes)))
            random.Random(f"{self.seed}/visit {visit}").shuffle(groups)
            ends = [*accumulate(sizes[group] for group in groups)]
            return _Visit(
                self._path(visit), groups, [*ends[WINDOW_GROUPS - 1 : -1 : WINDOW_GROUPS], ends[-1]]
            )

        return _kept(self._visits, visit, make)

    def _window(self, visit: int, window: int) -> list[str]:
        def read() -> list[str]:
            source = self._visit(visit)
            first = window * WINDOW_GROUPS
            texts: list[str] = []
            with _open(source.path) as table:
                column = text_column(source.path, table.schema_arrow)
                for group in source.groups[first : first + WINDOW_GROUPS]:
                    rows = table.read_row_group(group, columns=[column]).column(0).to_pylist()
                    texts += [text or "" for text in rows]
            random.Random(f"{self.seed}/visit {visit}/{window}").shuffle(texts)
            return texts

        return _kept(self._windows, (visit, window), read)


def _quietly(shard: Shard) -> None:
    """Fetches a shard; if that fails, the reader will meet the same error when it needs it."""
    with contextlib.suppress(UserError):
        shard.path()


K = TypeVar("K")
V = TypeVar("V")


def _kept(kept: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """The value of a key, made where it is missing; the least recently used ones go."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A Parquet file; its faults become UserErrors."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a readable Parquet file", str(error), "write or fetch it again"
        ) from None


class ShardWriter:
    """Spreads documents over `count` Parquet files by a key, so that each is a random sample.

    A context manager; nothing counts as written before it was left without an error.
    """

    def __init__(self, folder: Path, count: int) -> None:
        import pyarrow
        from pyarrow import parquet

        self._table = lambda texts: pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        schema = pyarrow.schema([("text", pyarrow.string())])
        self._waiting: list[list[str]] = [[] for _ in range(count)]
        self._files = [
            parquet.ParquetWriter(folder / f"shard_{n:05d}.parquet", schema, compression="zstd")
            for n in range(count)
        ]

    def add(self, key: int, text: str) -> None:
        """One more document; `key` is any number that is spread evenly."""
        place = key % len(self._files)
        waiting = self._waiting[place]
        waiting.append(text)
        if len(waiting) == GROUP_DOCUMENTS:
            self._flush(place)

    def _flush(self, place: int) -> None:
        if self._waiting[place]:
            self._files[place].write_table(self._table(self._waiting[place]))
            self._waiting[place] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for place, file in enumerate(self._files):
            self._flush(place)
            file.close()
