"""Training and encoding speed of the tokenizer beside the peers that are installed.

    .venv/bin/python benchmarks/tokenizer.py [FILE.jsonl.zst] [--mb 10] [--vocab-size 32768]

The median of five runs, all in this process, one thread unless said otherwise. Without a file it
makes text from the built-in world. `make bench` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fledge.tokenizer import Tokenizer, bpe, reference

os.environ["TOKENIZERS_PARALLELISM"] = "false"


def read_texts(path: Path | None, limit: int) -> list[str]:
    """Documents of about `limit` bytes in all."""
    texts: list[str] = []
    size = 0
    if path is not None:
        import zstandard

        with zstandard.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                texts.append(json.loads(line)["text"])
                size += len(texts[-1].encode())
                if size >= limit:
                    return texts
        return texts
    from fledge.data.worlds import load_world

    world = load_world("almanac", 0)
    while size < limit:
        texts.append(world.document("train", len(texts)).text)
        size += len(texts[-1].encode())
    return texts


def rate(megabytes: float, work: Callable[[], object], runs: int = 5) -> float:
    """Megabytes per second, median of `runs`."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return megabytes / statistics.median(seconds)


def peers(tok: Tokenizer) -> dict[str, Callable[[list[str]], object]]:
    """Other encoders with the same vocabulary, as far as they are installed."""
    found: dict[str, Callable[[list[str]], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder)
        try:
            import tokenizers

            theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
            found["HF tokenizers"] = lambda texts: [theirs.encode(t).ids for t in texts]
        except ImportError:
            pass
        try:
            import tiktoken
            from tiktoken.load import load_tiktoken_bpe

            encoding = tiktoken.Encoding(
                "fledge",
                pat_str=reference.PATTERNS[tok.pattern],
                mergeable_ranks=load_tiktoken_bpe(f"{folder}/vocab.tiktoken"),
                special_tokens={},
            )
            found["tiktoken"] = lambda texts: [encoding.encode_ordinary(t) for t in texts]
        except ImportError:
            pass
    return found


def main() -> None:
    """Prints one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--mb", type=float, default=10)
    parser.add_argument("--vocab-size", type=int, default=32768)
    args = parser.parse_args()
    texts = read_texts(args.file, int(args.mb * 1e6))
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB; engine {bpe._engine().__name__}")

    def show(what: str, work: Callable[[], object], runs: int = 5) -> None:
        print(f"{what:36} {rate(megabytes, work, runs):8.1f} MB/s")

    size = args.vocab_size
    show(f"train to {size}, one thread", lambda: Tokenizer.train(texts, size, threads=1))
    show(f"train to {size}, all threads", lambda: Tokenizer.train(texts, size))
    tok = Tokenizer.train(texts, size)
    ids = tok.encode_batch(texts)
    with tempfile.TemporaryDirectory() as folder:
        tok.save(folder)
        cold = Tokenizer.load(folder)
    show("encode, one thread, first pass", lambda: cold.encode_batch(texts, 1), 1)
    show("encode, one thread", lambda: tok.encode_batch(texts, 1))
    show("encode, all threads", lambda: tok.encode_batch(texts))
    show("decode", lambda: [tok.decode(i) for i in ids])
    for name, encode in peers(tok).items():
        show(f"encode, {name}", lambda encode=encode: encode(texts), 1)


if __name__ == "__main__":
    main()
