"""Sequences that share beginnings, folded together so that every shared token is read once.

The choices of a question differ in their last few tokens only, and few-shot prompts share thousands
of tokens. A `Trie` holds such sequences as one row of nodes: a node sees its ancestors and itself,
and stands at the position of its depth, so that a model given positions and mask computes for each
node what it would compute for the plain sequence. `fold` decides who shares a row; `batches` puts
rows of like size together. Used by `evals.scoring`; numpy only, no model, no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

MIN_SHARED = 0.25  # a sequence joins a row when at least this share of it is there already
MAX_NODES = 1024  # of one row: attention and its mask grow with the square of it


@dataclass
class Trie:
    """One row: `ids` of the nodes, their `depth`, and each member's path through them."""

    ids: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    paths: list[np.ndarray] = field(default_factory=list)
    members: list[int] = field(default_factory=list)  # which sequence each path is
    shared: list[int] = field(default_factory=list)  # tokens that a path found there

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_chain(self) -> bool:
        """Every node follows the one before: an ordinary sequence, causal without a mask."""
        return self.depth[-1] == len(self.depth) - 1

    def add(self, member: int, sequence: Sequence[int], shared: int) -> None:
        """Add a sequence whose first `shared` tokens are those of the last path."""
        new = len(sequence) - shared
        first = len(self.ids)
        trunk = self.paths[-1][:shared] if shared else np.empty(0, np.int64)
        self.ids.extend(sequence[shared:])
        self.depth.extend(range(shared, len(sequence)))
        self.paths.append(np.concatenate([trunk, np.arange(first, first + new)]))
        self.members.append(member)
        self.shared.append(shared)

    def mask(self, size: int) -> np.ndarray:
        """[size, size] bool: which nodes a node sees. Padding beyond the nodes sees itself."""
        seen = np.eye(size, dtype=bool)
        for path, shared in zip(self.paths, self.shared, strict=True):
            if shared == len(path):
                continue
            first, last = path[shared], path[-1] + 1
            seen[first:last, path[:shared]] = True
            seen[first:last, first:last] = np.tri(last - first, dtype=bool)
        return seen


def fold(sequences: Sequence[list[int]]) -> list[Trie]:
    """All sequences (none empty) in tries, in lexicographic order of their tokens.

    Sorted so, the longest beginning that a sequence shares with any earlier one it shares with its
    neighbour. Which ones share a row depends on the sequences only, never on a batch size.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    rows: list[Trie] = []
    previous: Sequence[int] = ()
    for index in order:
        sequence = sequences[index]
        shared = common_prefix(previous, sequence)
        joins = bool(rows) and shared >= max(1, MIN_SHARED * len(sequence))
        if not joins or len(rows[-1]) + len(sequence) - shared > MAX_NODES:
            rows.append(Trie())
            shared = 0
        rows[-1].add(index, sequence, shared)
        previous = sequence
    return rows


def chains(sequences: Sequence[Sequence[int]]) -> list[Trie]:
    """Every sequence as a row of its own: the plain twin of `fold`."""
    rows = [Trie() for _ in sequences]
    for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        row.add(index, sequence, 0)
    return rows


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # bisection over slices: comparing lists is fast
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def batches(rows: Sequence[Trie], *, max_rows: int, max_nodes: int) -> Iterator[list[Trie]]:
    """Rows of like size, largest first: at most `max_rows` of them and `max_nodes` padded nodes.

    Chains and tries do not mix: chains need no mask.
    """
    for chained in (False, True):
        waiting = [row for row in rows if row.is_chain is chained]
        waiting.sort(key=lambda row: -len(row))
        at = 0
        while at < len(waiting):
            count = max(1, min(max_rows, max_nodes // len(waiting[at])))
            yield waiting[at : at + count]
            at += count
