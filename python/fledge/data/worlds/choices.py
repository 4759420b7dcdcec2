"""Seeded random decisions that count their own bits.

Every decision of the generator goes through one `Choices`: it draws, and adds -log2 of the drawn
option's probability to `bits`. The sum over documents divided by their bytes is an upper bound of
the entropy of the prose, against which a model's bits per byte is held. The draws use only
`random.Random.random`, whose sequence Python promises never to change, seeded by a SHA-256 of a
text key, so the same key gives the same decisions in every Python version and on every platform.
Called by the rest of `fledge.data.worlds`; never reads a clock or global random state.
"""

from __future__ import annotations

import hashlib
import random
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import log2
from typing import Generic, TypeVar

T = TypeVar("T")


def digest(key: str) -> int:
    """A 128-bit number that depends on `key` alone (never on Python's salted hash)."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:16], "big")


class Weighted(Generic[T]):
    """Options with unequal probabilities, prepared once and drawn from often."""

    __slots__ = ("bits", "items", "thresholds")

    def __init__(self, weights: Mapping[T, float] | Sequence[tuple[T, float]]) -> None:
        pairs = list(weights.items() if isinstance(weights, Mapping) else weights)
        pairs = [(item, weight) for item, weight in pairs if weight > 0]
        total = sum(weight for _, weight in pairs)
        self.items = [item for item, _ in pairs]
        self.thresholds = list(accumulate(weight / total for _, weight in pairs))[:-1]
        self.bits = [log2(total / weight) for _, weight in pairs]


class Choices:
    """A stream of random decisions fixed by `key`; `bits` is -log2 of the path taken so far."""

    __slots__ = ("_random", "bits")

    def __init__(self, key: str) -> None:
        self._random = random.Random(digest(key)).random
        self.bits = 0.0

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, all equally likely."""
        size = len(items)
        self.bits += log2(size)
        return items[int(self._random() * size)]

    def weighted(self, options: Weighted[T]) -> T:
        """One of the options with its own probability."""
        found = bisect_right(options.thresholds, self._random())
        self.bits += options.bits[found]
        return options.items[found]

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included, all equally likely."""
        size = high - low + 1
        self.bits += log2(size)
        return low + int(self._random() * size)

    def chance(self, p: float) -> bool:
        """True with probability p, 0 < p < 1."""
        hit = self._random() < p
        self.bits -= log2(p if hit else 1.0 - p)
        return hit

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """k different items in random order (every ordered selection equally likely)."""
        size = len(items)
        taken: dict[int, int] = {}
        result = []
        for i in range(k):  # Fisher-Yates on a sparse copy: O(k), whatever the size
            self.bits += log2(size - i)
            j = i + int(self._random() * (size - i))
            result.append(items[taken.get(j, j)])
            taken[j] = taken.get(i, i)
        return result

    def shuffle(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))


class Template:
    """Text with {slots}, parsed once.

    A slot whose name is bound takes that value. Otherwise one of `lists[name]` is drawn; a trailing
    digit, as in {place1}, makes the drawn value stay bound, so that the text can repeat it. The
    article "a" before a slot becomes "an" where the value asks for it.
    """

    __slots__ = ("parts", "tail", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        pieces = re.split(r"\{(\w+)\}", text)
        self.tail = pieces[-1]
        self.parts = [
            (literal, slot, slot.rstrip("0123456789"), re.search(r"(?:^|\s)[aA] $", literal))
            for literal, slot in zip(pieces[0:-1:2], pieces[1::2], strict=True)
        ]

    def fill(
        self, choices: Choices, bound: dict[str, str], lists: Mapping[str, Sequence[object]]
    ) -> str:
        """The text with every slot filled; adds to `bound` what it keeps."""
        out = []
        for literal, slot, base, article in self.parts:
            value = bound.get(slot)
            if value is None:
                value = str(choices.choice(lists[base]))
                if slot != base:
                    bound[slot] = value
            out.append(f"{literal[:-1]}n " if article and _wants_an(value) else literal)
            out.append(value)
        out.append(self.tail)
        return "".join(out)


def _wants_an(value: str) -> bool:
    return value.startswith(("a", "e", "i", "o", "um", "ug", "un")) and not value.startswith("uni")


def templates(texts: Sequence[str]) -> list[Template]:
    """The parsed templates of some texts."""
    return [Template(text) for text in texts]
