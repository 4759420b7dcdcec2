"""Byte-level BPE in plain Python: the lesson, the oracle of the tests, and the fallback.

Same names and same results as the Rust module `fledge._bpe`, twenty to fifty times slower. Read it
top to bottom: text is *split* into pieces by a published regex, *training* joins the most frequent
pair of tokens again and again, *encoding* replays those merges inside each piece. Ids 0..255 are
the bytes; merge number i makes id 256 + i. `fledge.tokenizer.bpe` calls it where the Rust module is
not built. It knows no special tokens and no files.

One difference: letters and digits come from the `unicodedata` of the running Python, so characters
that are newer than it count as punctuation here.
"""

from __future__ import annotations

import functools
import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

Pair = tuple[int, int]

NUM_BYTES = 256

# Published split patterns: Qwen2 (single digits), Llama 3 (up to three), and GPT-4's with runs of
# two digits as nanochat has it.
PATTERNS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt4-2": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}

# The characters of the Unicode property White_Space. (str.isspace() has four more.)
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def split(text: str, pattern: str) -> list[str]:
    """The pieces of `text`; joined they are `text` again."""
    return _compiled(pattern).findall(text)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """The published pattern for the standard library's `re`, which lacks \\p{...}."""
    if pattern not in PATTERNS:
        raise ValueError(f"there is no pattern {pattern!r}; the patterns are {', '.join(PATTERNS)}")
    classes = {r"\p{L}": _ranges("L"), r"\p{N}": _ranges("N"), r"\s": WHITE_SPACE}

    def expand(match: re.Match[str]) -> str:
        source = match.group()
        form = "{}" if source.startswith("[") else "[{}]"  # already inside a class, or not
        for name, characters in classes.items():
            source = source.replace(name, form.format(characters))
        return source

    source = PATTERNS[pattern].replace(r"\S", f"[^{WHITE_SPACE}]")
    return re.compile(re.sub(r"\[[^\]]*\]|\\p\{.\}|\\s", expand, source))


def _ranges(category: str) -> str:
    """All characters of a general category (its first letter) in the notation of `re`."""
    ranges: list[list[int]] = []
    for code in range(0x110000):
        if unicodedata.category(chr(code))[0] == category:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def merge_pair(tokens: Sequence[int], pair: Pair, new: int) -> list[int]:
    """`tokens` with every `pair` replaced by `new`, from the left.

    >>> merge_pair([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    merged, i = [], 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def train(
    texts: Iterable[str], num_merges: int, pattern: str, threads: int | None = None
) -> list[Pair]:
    """The first `num_merges` merges; fewer if the texts hold no further pair.

    The pair with the highest count is joined first; among equals the smaller pair of ids. `threads`
    is accepted for the sake of the Rust module and changes nothing.
    """
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(split(text, pattern))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    counts: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = defaultdict(set)  # the words in which a pair occurs, or once did
    for index, (tokens, count) in enumerate(words):
        for pair in pairwise(tokens):
            counts[pair] += count
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < num_merges:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:  # an old pair only ever gets rarer: put its true count back
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new = NUM_BYTES + len(merges)
        merges.append(pair)
        changes: Counter[Pair] = Counter()
        for index in places.pop(pair):
            tokens, count = words[index]
            merged = merge_pair(tokens, pair, new)
            if len(merged) == len(tokens):
                continue
            for old in pairwise(tokens):
                changes[old] -= count
            for fresh in pairwise(merged):
                changes[fresh] += count
                if new in fresh:
                    places[fresh].add(index)
            words[index] = (merged, count)
        for changed, difference in changes.items():
            counts[changed] += difference
            if new in changed:
                heapq.heappush(heap, (-counts[changed], changed))
        del counts[pair]
    return merges


class Bpe:
    """A trained byte-level BPE: split pattern and merges."""

    def __init__(self, merges: Sequence[Pair], pattern: str) -> None:
        _compiled(pattern)  # raises for an unknown name
        self.merges = [(left, right) for left, right in merges]
        self.pattern = pattern
        self._ids: dict[Pair, int] = {}
        self._bytes = [bytes([b]) for b in range(NUM_BYTES)]
        for i, pair in enumerate(self.merges):
            new = NUM_BYTES + i
            if max(pair) >= new:
                raise ValueError(f"merge {i} {pair} uses an id above {new - 1}")
            if pair in self._ids:
                raise ValueError(f"merge {i} {pair} occurs twice")
            self._ids[pair] = new
            self._bytes.append(self._bytes[pair[0]] + self._bytes[pair[1]])
        self._encode_piece = functools.lru_cache(maxsize=1 << 16)(self._encode_piece_uncached)

    @property
    def num_tokens(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        pieces = split(text, self.pattern)
        return [token for piece in pieces for token in self._encode_piece(piece)]

    def _encode_piece_uncached(self, piece: str) -> list[int]:
        tokens = list(piece.encode())
        while len(tokens) > 1:
            pairs = set(pairwise(tokens))
            # An earlier merge has a lower id, so the lowest id is the merge that comes first.
            best = min(pairs, key=lambda pair: self._ids.get(pair, float("inf")))
            if best not in self._ids:
                break
            tokens = merge_pair(tokens, best, self._ids[best])
        return tokens

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """The ids of each text; `threads` changes nothing here."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for; they may end inside a character."""
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token."""
        if not 0 <= id < len(self._bytes):
            raise ValueError(f"token {id} is not below {len(self._bytes)}")
        return self._bytes[id]
