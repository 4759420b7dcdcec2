"""Are our ids tiktoken's, with the same ranks? On real text, and on text made to be awkward.

    python benchmarks/tokenizer_equal.py TOKENIZER TEXT... [--mb 100] [--fuzz-seconds 60]

TOKENIZER is a folder that `fledge tok train` wrote; TEXT are files or folders of it, read from the
start again if they are shorter than `--mb`. Three vocabularies are compared: the ranks of training;
the same with the single bytes in another order, as OpenAI's files have them; and the same with
every seventh longer token left out, so that some tokens are made of no two others. The first is
compared on all of the text, the others on a tenth. Exit status 1 if any id differs. Results are in
tokenizer.md.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from fledge.cli_tok import documents
from fledge.tokenizer import Tokenizer, reference
from fledge.tokenizer.bpe import engine
from fledge.tokenizer.files import load_tiktoken

MB = 1_000_000
ALPHABETS = (
    "ab",
    "abcde ",
    " \t\r\n",
    "sStTreVEllab012!?'\u2019 \n",
    "".join(map(chr, range(0x20, 0x250))),
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e01\u0e33\u4e2d\u6587\uff0c\uac00\u0301\u200d",
    "\U0001f600\U0001f468\u200d\ufe0f\U0001f1e9\U0001f1ea 1",
)


def vocabularies(tokens: list[bytes]) -> dict[str, list[bytes]]:
    """Name -> tokens in the order of their ranks."""
    order = random.Random(0)
    shuffled = order.sample(tokens[:256], 256) + tokens[256:]
    kept = [token for i, token in enumerate(shuffled) if i < 256 or i % 7]
    return {"as trained": tokens, "bytes in another order": shuffled, "thinned out": kept}


def awkward(chance: random.Random) -> str:
    """Runs and mixtures of few characters, now and then long; any code point now and then."""
    parts = []
    for _ in range(chance.randrange(1, 6)):
        if chance.random() < 0.2:
            codes = (chance.randrange(0x110000) for _ in range(chance.randrange(20)))
            parts.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
            continue
        alphabet = chance.choice(ALPHABETS)
        unit = "".join(chance.choices(alphabet, k=chance.randrange(1, 40)))
        parts.append(unit * chance.choice([1, 1, 1, 2, 5, 60]))
    return "".join(parts)


def taken(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts of together at least `size` bytes."""
    while size > 0:
        text = next(texts)
        size -= len(text.encode())
        yield text


class Comparison:
    """What was compared, and how much of it differs."""

    def __init__(self, tokens: list[bytes], pattern: str) -> None:
        self.ours = engine().Bpe.from_ranks(tokens, pattern)
        self.theirs = tiktoken.Encoding(
            "ranks",
            pat_str=reference.PATTERNS[pattern],
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={},
        )
        self.texts = self.bytes = self.tokens = self.different = 0

    def add(self, text: str) -> None:
        ids = self.ours.encode(text)
        self.texts += 1
        self.bytes += len(text.encode())
        self.tokens += len(ids)
        if ids != self.theirs.encode_ordinary(text):
            self.different += 1
            print(f"differs: {text[:200]!r}", file=sys.stderr)

    def __str__(self) -> str:
        return (
            f"{self.texts:,} texts, {self.bytes / MB:.1f} MB, {self.tokens:,} tokens, "
            f"{self.different} texts differ"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--fuzz-seconds", type=float, default=60)
    args = parser.parse_args()
    pattern = Tokenizer.load(args.tokenizer).pattern
    tokens = load_tiktoken(args.tokenizer / "vocab.tiktoken")
    different = 0
    for index, (name, ranks) in enumerate(vocabularies(tokens).items()):
        size = int(args.mb * MB) // (10 if index else 1)
        texts = (text for _ in itertools.count() for text in documents(args.text))
        real, fuzz = Comparison(ranks, pattern), Comparison(ranks, pattern)
        for text in taken(texts, size):
            real.add(text)
        chance = random.Random(index)
        until = time.monotonic() + args.fuzz_seconds / 3
        while time.monotonic() < until:
            fuzz.add(awkward(chance))
        print(f"{name}, {len(ranks):,} tokens, pattern {pattern}")
        print(f"  real text: {real}\n  fuzz:      {fuzz}", flush=True)
        different += real.different + fuzz.different
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
