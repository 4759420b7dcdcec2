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

import array
import functools
import heapq
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

Pair = tuple[int, int]

NUM_BYTES = 256

# Published split patterns: Qwen2 (single digits), Llama 3 (up to three), GPT-4's with runs of two
# digits as nanochat has it, and GPT-4o's (o200k_base), which also cuts where case changes.
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
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
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        + _WORD_END
        + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        + _WORD_END
        + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def _with_marks(regex: str) -> str:
    """`regex` with combining marks counted as letters: the words of Hindi, Tamil, Thai stay whole.

    >>> _with_marks(r"\\p{L}+|[^\\p{L}]")
    '[\\p{L}\\p{M}]+|[^\\p{L}\\p{M}]'
    """

    def add(match: re.Match[str]) -> str:
        if match.group().startswith("["):
            return match.group().replace(r"\p{L}", r"\p{L}\p{M}")
        return r"[\p{L}\p{M}]"

    return re.sub(r"\[[^\]]*\]|\\p\{L\}", add, regex)


MARKS = "+marks"
PATTERNS |= {f"{name}{MARKS}": _with_marks(regex) for name, regex in PATTERNS.items()}

# "regex:" and any regex is a pattern too: matches are pieces, and so is the text between them.
CUSTOM = "regex:"

# The characters of the Unicode property White_Space. (str.isspace() has four more.)
WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def pattern_regex(pattern: str) -> str:
    """The regex that a pattern's name stands for. ValueError for an unknown name."""
    if pattern.startswith(CUSTOM):
        return pattern.removeprefix(CUSTOM)
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    known = ", ".join(PATTERNS)
    raise ValueError(
        f"there is no pattern {pattern!r}; the patterns are {known}, or {CUSTOM} and a regex"
    )


def split(text: str, pattern: str) -> list[str]:
    """The pieces of `text`; joined they are `text` again."""
    if not pattern.startswith(CUSTOM):
        return _compiled(pattern).findall(text)
    cuts = {place for match in _compiled(pattern).finditer(text) for place in match.span()}
    return [text[start:end] for start, end in pairwise(sorted(cuts | {0, len(text)}))]


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """The regex of a pattern for the standard library's `re`, which lacks \\p{...}."""
    regex = pattern_regex(pattern)

    def expand(match: re.Match[str]) -> str:
        in_class = match.group().startswith("[")
        source = re.sub(r"\\p\{(\w+)\}|\\s", characters, match.group())
        return source if in_class else f"[{source}]"

    def characters(match: re.Match[str]) -> str:
        return _ranges(match[1]) if match[1] else WHITE_SPACE

    regex = regex.replace(r"\S", f"[^{WHITE_SPACE}]")
    try:
        return re.compile(re.sub(r"\[[^\]]*\]|\\p\{\w+\}|\\s", expand, regex))
    except re.error as error:
        raise ValueError(f"the split regex {regex!r} does not work: {error}") from None


def _ranges(category: str) -> str:
    """All characters of a general category ("L", "Lu") in the notation of `re`."""
    return "".join(
        f"\\U{first:08x}-\\U{last:08x}"
        for first, last, found in _categories()
        if found.startswith(category)
    )


@functools.cache
def _categories() -> list[tuple[int, int, str]]:
    """Every run of characters of one general category: first, last, category."""
    runs: list[tuple[int, int, str]] = []
    for category, run in groupby(range(0x110000), lambda code: unicodedata.category(chr(code))):
        codes = list(run)
        runs.append((codes[0], codes[-1], category))
    return runs


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
    texts: Iterable[str],
    num_merges: int,
    pattern: str,
    threads: int | None = None,
    progress: Callable[[str, int, int | None], object] | None = None,
    *,
    total_bytes: int | None = None,
    max_memory_bytes: int | None = None,
) -> list[Pair]:
    """The first `num_merges` merges; fewer if the texts hold no further pair.

    The pair with the highest count is joined first; among equals the smaller pair of ids.
    `progress` is called with ("count", bytes so far, `total_bytes`) and ("merge", merges so far,
    `num_merges`) now and then. `threads` and `max_memory_bytes` are accepted for the sake of the
    Rust module and change nothing.
    """
    report = progress or (lambda phase, done, total: None)
    pieces: Counter[str] = Counter()
    num_bytes = 0
    for index, text in enumerate(texts):
        pieces.update(split(text, pattern))
        num_bytes += len(text.encode())
        if index % 1000 == 999:
            report("count", num_bytes, total_bytes)
    report("count", num_bytes, total_bytes)
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
        if len(merges) % 100 == 0:
            report("merge", len(merges), num_merges)
    report("merge", len(merges), num_merges)
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

    @classmethod
    def from_ranks(cls, tokens: Sequence[bytes], pattern: str) -> Bpe:
        """The BPE of tokens in the order of their ranks, as tiktoken has it.

        Any two neighbours join whose bytes together are a token, the lowest rank first, and a piece
        that is a token is that token. ValueError for a token twice or without bytes, or a byte that
        is none.
        """
        return _RankBpe(tokens, pattern)

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

    def encode_u16(self, text: str) -> bytearray:
        """The ids of `text` as the memory of an array of uint16."""
        return _memory("H", self.encode(text))

    def encode_u32(self, text: str) -> bytearray:
        """The ids of `text` as the memory of an array of uint32."""
        return _memory("I", self.encode(text))

    def encode_batch_u16(
        self, texts: Sequence[str], threads: int | None = None
    ) -> tuple[bytearray, bytearray]:
        """All ids as one such array, and uint64 where each text begins and the last ends."""
        return self._batch("H", texts)

    def encode_batch_u32(
        self, texts: Sequence[str], threads: int | None = None
    ) -> tuple[bytearray, bytearray]:
        """The same with uint32."""
        return self._batch("I", texts)

    def _batch(self, kind: str, texts: Sequence[str]) -> tuple[bytearray, bytearray]:
        each = [self.encode(text) for text in texts]
        ends = itertools.accumulate(map(len, each), initial=0)
        return _memory(kind, itertools.chain.from_iterable(each)), _memory("Q", ends)

    def count(self, text: str) -> int:
        """How many ids `text` has."""
        return len(self.encode(text))

    def decode(self, ids: Sequence[int], errors: str) -> str:
        """The text of `ids`; `errors` says what becomes of bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_array(self, ids: bytes) -> bytes:
        """`decode_bytes` of an array of uint32 given by its bytes."""
        return self.decode_bytes(array.array("I", ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for; they may end inside a character."""
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token."""
        if not 0 <= id < len(self._bytes):
            raise ValueError(f"token {id} is not below {len(self._bytes)}")
        return self._bytes[id]


class _RankBpe(Bpe):
    """A BPE that knows its tokens by their bytes instead of by merges."""

    def __init__(self, tokens: Sequence[bytes], pattern: str) -> None:
        super().__init__([], pattern)
        self._bytes = list(tokens)
        self._ranks: dict[bytes, int] = {}
        for rank, token in enumerate(tokens):
            if not token:
                raise ValueError(f"the token of rank {rank} has no bytes")
            if token in self._ranks:
                raise ValueError(f"ranks {self._ranks[token]} and {rank} are both {token!r}")
            self._ranks[token] = rank
        for byte in range(NUM_BYTES):
            if bytes([byte]) not in self._ranks:
                raise ValueError(f"no token is the single byte 0x{byte:02x}")

    def _encode_piece_uncached(self, piece: str) -> list[int]:
        whole = self._ranks.get(piece.encode())
        if whole is not None:
            return [whole]
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            joined = [self._ranks.get(left + right) for left, right in pairwise(parts)]
            ranks = [rank for rank in joined if rank is not None]
            if not ranks:
                break
            at = joined.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self._ranks[part] for part in parts]


def _memory(kind: str, numbers: Iterable[int]) -> bytearray:
    return bytearray(array.array(kind, numbers).tobytes())
