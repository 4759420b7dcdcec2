"""The tokenizer beside its peers: training, encoding, decoding and hostile text, in one run.

`fledge tok bench` and `fledge bench tok` call `run`. Every measurement is a process of its own
(`tok_jobs.py`), so that caches are cold, memory is its own, and a peer cannot disturb the next;
the contenders take turns, and a ratio is the median over the rounds with its smallest and largest.
Peers that are not installed are named and left out. Nothing here is called by the product, and
nothing gates on seconds.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge.bench.tok_jobs import MB, read_documents
from fledge.data.worlds import load_world
from fledge.errors import UserError
from fledge.tokenizer import Tokenizer

JOB_TIMEOUT_SECONDS = 1800
TRAINERS = {"rustbpe": "rustbpe", "HF tokenizers": "tokenizers", "gigatoken": "gigatoken"}
ENCODERS = {
    "gigatoken": "gigatoken",
    "fastokens": "fastokens",
    "tiktoken": "tiktoken",
    "kitoken": "kitoken",
    "HF tokenizers": "tokenizers",
}
FORMS = ("document", "loop", "batch", "decode")  # of encoding and back
PARTS = ("train", *FORMS, "hostile")
PEERS = tuple(dict.fromkeys([*TRAINERS, *ENCODERS]))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured: megabytes to train on and to encode, vocabulary, rounds, threads."""

    train_mb: float = 100
    document_mb: float = 10  # of the one long document, and of all the short ones together
    vocab_size: int = 32768
    runs: int = 5
    threads: int = 2
    parts: tuple[str, ...] = PARTS
    peers: tuple[str, ...] = PEERS


def run(texts: Iterable[str], settings: Settings, say: Say) -> list[dict[str, Any]]:
    """Rows of DESIGN 4.3: name, value, unit, peer, peer_value, ratio, low, high.

    `texts` is read until it gives enough, from the start again if it is short. Raises UserError
    when it is empty or a contender fails.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fledge-bench-") as place:
        folder = Path(place)
        train, held_out = write_texts(texts, folder, settings)
        say(f"{train / MB:.1f} MB to train on, {held_out / MB:.1f} MB held out to encode")
        if "train" in settings.parts:
            rows += bench_training(folder, settings, say)
        if set(settings.parts) - {"train"}:
            train_texts = read_documents(folder / "train.json")
            Tokenizer.train(train_texts, settings.vocab_size).save(folder / "tokenizer")
        if set(FORMS) & set(settings.parts):
            rows += bench_encoding(folder, settings, say)
        if "hostile" in settings.parts:
            rows += bench_hostile(folder, settings, say)
    return rows


def run_default() -> tuple[list[dict[str, Any]], list[str]]:
    """A smaller measurement on the almanac's prose, for `fledge bench tok`; rows and notes."""
    notes: list[str] = []

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if line.startswith("not installed"):
            notes.append(line)

    return run(almanac_prose(), Settings(train_mb=25, runs=3), say), notes


def almanac_prose() -> Iterator[str]:
    """The text that is measured where nobody names one."""
    world = load_world("almanac", 0)
    for index in range(20_000):
        yield world.document("train", index).text


def write_texts(texts: Iterable[str], folder: Path, settings: Settings) -> tuple[int, int]:
    """The training documents and the held-out ones as files; their bytes."""
    wanted, held_out_wanted = int(settings.train_mb * MB), int(settings.document_mb * MB)
    documents, size = [], 0
    for text in texts:
        documents.append(text)
        size += len(text.encode())
        if size >= wanted + held_out_wanted:
            break
    if not size:
        raise UserError("there is no text to measure with", "the source is empty", "give another")
    again = itertools.cycle(documents)
    held_out, held_out_bytes = take(again, held_out_wanted)
    train, train_bytes = take(again, wanted)
    write_documents(folder / "train.json", train)
    write_documents(folder / "held_out.json", held_out)
    (folder / "train.txt").write_text("\n".join(train), encoding="utf-8")
    return train_bytes, held_out_bytes


def take(texts: Iterator[str], wanted: int) -> tuple[list[str], int]:
    """The next texts, until they have `wanted` bytes, and their bytes."""
    taken, size = [], 0
    while size < wanted:
        taken.append(next(texts))
        size += len(taken[-1].encode())
    return taken, size


def write_documents(path: Path, documents: list[str]) -> None:
    path.write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The results as lines of Markdown; a ratio above 1 means that fledge is better."""
    lines = [
        "| what | fledge | peer | its value | ratio [lowest, highest] |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in rows:
        ours, theirs = (shown(result[key], result["unit"]) for key in ("value", "peer_value"))
        ratio = "-"
        if result["ratio"] is not None:
            ratio = f"**{result['ratio']:.2f}** [{result['low']:.2f}, {result['high']:.2f}]"
        lines.append(
            f"| {result['name']} | {ours} | {result['peer'] or '-'} | {theirs} | {ratio} |"
        )
    return "\n".join(lines)


def shown(value: float | None, unit: str) -> str:
    """A value with its unit, bytes as MB."""
    if value is None:
        return "-"
    if value == 0:
        return "gives up"
    if unit == "bytes":
        return f"{value / MB:.0f} MB"
    return f"{value:.2f} {unit}" if value < 100 else f"{value:.0f} {unit}"


# -- rounds ----------------------------------------------------------------------------------------


def bench_training(folder: Path, settings: Settings, say: Say) -> list[dict[str, Any]]:
    """Seconds and peak memory of training, contenders in turn."""
    names = ["fledge", *installed(TRAINERS, settings, say)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, name in rounds(names, settings.runs):
        job = {"what": "train", "name": name, "folder": str(folder), "size": settings.vocab_size,
               "threads": settings.threads}  # fmt: skip
        found[name].append(call(job))
        say(f"train, round {number}: {name} {found[name][-1]['seconds']:.2f} s")
    what = f"train {settings.train_mb:g} MB to {settings.vocab_size:,}"
    rows = []
    for peer in names[1:]:
        rows.append(row(what, "s", peer, found, "seconds", less_is_better=True))
        rows.append(row(f"{what}, peak memory", "bytes", peer, found, "peak_bytes",
                        less_is_better=True))  # fmt: skip
    return rows or [alone(what, "s", found["fledge"], "seconds")]


def bench_encoding(folder: Path, settings: Settings, say: Say) -> list[dict[str, Any]]:
    """MB/s of every form of encoding and of decoding, cold and warm."""
    names = ["fledge", *installed(ENCODERS, settings, say)]
    rows = []
    for form in (form for form in FORMS if form in settings.parts):
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number, name in rounds(names, settings.runs):
            job = {"what": form, "name": name, "folder": str(folder), "threads": settings.threads}
            result = call(job)
            found[name].append(result)
            shown = ", ".join(f"{key} {value:.0f}" for key, value in result["rates"].items())
            say(f"{form}, round {number}: {name} {shown} MB/s")
        for key in found["fledge"][0]["rates"]:
            flat = {n: [r["rates"] for r in results] for n, results in found.items()}
            for peer in names[1:]:
                if key in flat[peer][0]:
                    rows.append(row(f"{form}, {key}", "MB/s", peer, flat, key))
            if len(names) == 1:
                rows.append(alone(f"{form}, {key}", "MB/s", flat["fledge"], key))
    return rows


def bench_hostile(folder: Path, settings: Settings, say: Say) -> list[dict[str, Any]]:
    """MB/s on text made to be slow; `normal` is prose of the same length."""
    prose = "\n".join(read_documents(folder / "held_out.json"))
    write_documents(folder / "hostile.json", list(hostile_texts(prose).values()))
    kinds = list(hostile_texts(""))
    present = installed({k: ENCODERS[k] for k in ("tiktoken", "HF tokenizers")}, settings, say)
    names = ["fledge", *present]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, name in rounds(names, min(3, settings.runs)):
        job = {"what": "hostile", "name": name, "folder": str(folder), "kinds": kinds}
        found[name].append(call(job)["rates"])
        slowest = min(found[name][-1], key=found[name][-1].__getitem__)
        say(f"hostile, round {number}: {name}, slowest on {slowest}")
    rows = []
    for kind in kinds:
        rows += [row(f"hostile, {kind}", "MB/s", peer, found, kind) for peer in present]
        if not present:
            rows.append(alone(f"hostile, {kind}", "MB/s", found["fledge"], kind))
    return rows


def hostile_texts(prose: str, size: int = MB) -> dict[str, str]:
    """About `size` bytes each of text that has made some tokenizer slow."""
    chance = random.Random(0)
    noise = bytes(chance.getrandbits(8) for _ in range(1 << 16))
    texts = {
        "normal": prose or " ",
        "one letter": "a",
        "spaces": " ",
        "newlines": "\n",
        "digits": "7",
        "emoji": "\U0001f600",
        "CJK": "".join(chr(0x4E00 + chance.randrange(20000)) for _ in range(4096)),
        "combining marks": "e" + "\u0301" * 63,
        "random bytes": noise.decode("utf-8", "replace"),
        "alternating case": "aB",
        "random letters": "".join(chance.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(4096)),
    }
    repeated = {name: text * (size // len(text.encode()) + 1) for name, text in texts.items()}
    return {name: t.encode()[:size].decode("utf-8", "ignore") for name, t in repeated.items()}


def rounds(names: list[str], runs: int) -> Iterator[tuple[int, str]]:
    """Every contender once a round, the order turning, so that drift hits all alike."""
    for number in range(runs):
        at = number % len(names)
        for name in [*names[at:], *names[:at]]:
            yield number + 1, name


def installed(peers: dict[str, str], settings: Settings, say: Say) -> list[str]:
    """The wanted peers whose package can be imported; the others are named."""
    wanted = [name for name in peers if name in settings.peers]
    missing = [name for name in wanted if importlib.util.find_spec(peers[name]) is None]
    if missing:
        say(f"not installed, so not beside it: {', '.join(missing)}")
    return [name for name in wanted if name not in missing]


def row(
    name: str,
    unit: str,
    peer: str,
    found: dict[str, list[dict[str, Any]]],
    key: str,
    *,
    less_is_better: bool = False,
) -> dict[str, Any]:
    """One result; `ratio` above 1 means that fledge is better."""
    ours = [result[key] for result in found["fledge"]]
    theirs = [result[key] for result in found[peer]]
    result = {
        "name": name,
        "value": statistics.median(ours),
        "unit": unit,
        "peer": peer,
        "peer_value": statistics.median(theirs),
    }
    if not all(theirs):  # a rate of 0: the peer gave up on that text
        return result | dict.fromkeys(("ratio", "low", "high"))
    pairs = zip(ours, theirs, strict=True)
    ratios = [t / o if less_is_better else o / t for o, t in pairs]
    return result | {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def alone(name: str, unit: str, results: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """A result without a peer."""
    value = statistics.median(result[key] for result in results)
    nothing = dict.fromkeys(("peer", "peer_value", "ratio", "low", "high"))
    return {"name": name, "value": value, "unit": unit, **nothing}


def call(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job in a fresh process; UserError with its last line if it fails."""
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "true" if job.get("threads", 1) > 1 else "false",
        "RAYON_NUM_THREADS": str(job.get("threads", 1)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fledge.bench.tok_jobs", json.dumps(job)],
        capture_output=True, text=True, env=environment, timeout=JOB_TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise UserError(
            f"measuring {job['name']} ({job['what']}) failed", lines[-1], "leave that peer out"
        )
    return json.loads(done.stdout.splitlines()[-1])  # peers may print before it
