"""Contamination: which questions of an exam stand, word for word, in the training text.

A question counts as overlapped when a run of N words of it (13, as GPT-3's authors took, arXiv
2005.14165 appendix C) occurs in a document; words are lower case letters and digits, all else is
ignored. A question shorter than N words is looked for whole, one shorter than MIN_WORDS is not
looked for and counted. Every hit of the hash is checked word by word. Called by
`fledge data overlap`; it reads, it judges no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fledge.data.text_files import (
    TEXT_FIELDS,
    SourceFile,
    find_files,
    json_lines,
    jsonl_texts,
    parquet_texts,
    text_documents,
)

WORDS = 13
MIN_WORDS = 8
SHOWN = 5  # overlapped questions of a task that are shown
_WORD = re.compile(r"[^\W_]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """The words that count: runs of letters and digits in lower case."""
    return _WORD.findall(text.lower())


@dataclass
class Probe:
    """The questions to look for, by the hashes of their runs of words."""

    n: int = WORDS
    items: list[tuple[str, str, list[str]]] = field(default_factory=list)  # task, id, words
    too_short: dict[str, int] = field(default_factory=dict)

    def add(self, task: str, item: str, text: str) -> None:
        """Look for this question too."""
        words = words_of(text)
        self.too_short.setdefault(task, 0)
        if len(words) < min(self.n, MIN_WORDS):
            self.too_short[task] += 1
        else:
            self.items.append((task, item, words))

    def search(self, documents: Iterable[str]) -> dict[str, dict[str, Any]]:
        """By task: {"items", "too_short", "overlapped", "share", "examples"}."""
        tables = self._tables()
        found: dict[int, str] = {}
        codes: dict[str, int] = {}
        for document in documents:
            self._search_one(document, tables, codes, found)
        return self._summary(found)

    def _tables(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Length of a run -> (sorted hashes, item of each, place of each in the item's words)."""
        codes: dict[str, int] = {}
        runs: dict[int, list[tuple[np.ndarray, int]]] = {}
        for index, (_, _, words) in enumerate(self.items):
            length = min(self.n, len(words))
            runs.setdefault(length, []).append((_run_hashes(_codes(words, codes), length), index))
        tables = {}
        for length, parts in runs.items():
            hashes = np.concatenate([part for part, _ in parts])
            owners = np.concatenate([np.full(len(part), index) for part, index in parts])
            places = np.concatenate([np.arange(len(part)) for part, _ in parts])
            order = np.argsort(hashes, kind="stable")
            tables[length] = (hashes[order], owners[order], places[order])
        return tables

    def _search_one(
        self,
        document: str,
        tables: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]],
        codes: dict[str, int],
        found: dict[int, str],
    ) -> None:
        words = words_of(document)
        coded = _codes(words, codes)
        for length, (hashes, owners, places) in tables.items():
            if len(words) < length:
                continue
            runs = _run_hashes(coded, length)
            left = np.searchsorted(hashes, runs)
            left[left == len(hashes)] = 0
            for at in np.flatnonzero(hashes[left] == runs):
                first = int(left[at])
                last = int(np.searchsorted(hashes, runs[at], side="right"))
                run = words[at : at + length]
                for row in range(first, last):
                    owner, place = int(owners[row]), int(places[row])
                    if owner not in found and self.items[owner][2][place : place + length] == run:
                        found[owner] = " ".join(run)

    def _summary(self, found: Mapping[int, str]) -> dict[str, dict[str, Any]]:
        result: dict[str, dict[str, Any]] = {
            task: {
                "items": short,
                "too_short": short,
                "overlapped": 0,
                "share": 0.0,
                "examples": [],
            }
            for task, short in self.too_short.items()
        }
        for index, (task, item, _) in enumerate(self.items):
            row = result[task]
            row["items"] += 1
            if index in found:
                row["overlapped"] += 1
                if len(row["examples"]) < SHOWN:
                    row["examples"].append({"id": item, "words": found[index]})
        for row in result.values():
            row["share"] = row["overlapped"] / row["items"] if row["items"] else 0.0
        return result


def _codes(words: list[str], codes: dict[str, int]) -> np.ndarray:
    """A 64-bit number for every word, the same in every process."""
    import zlib

    for word in words:
        if word not in codes:
            data = word.encode()
            codes[word] = zlib.crc32(data) << 32 | zlib.crc32(data, 0xFFFFFFFF)
    return np.fromiter((codes[word] for word in words), np.uint64, len(words))


def _run_hashes(codes: np.ndarray, length: int) -> np.ndarray:
    """A hash of every run of `length` words."""
    mixed = (codes ^ (codes >> np.uint64(29))) * _BASE
    total = np.zeros(len(codes) - length + 1, np.uint64)
    for k in range(length):
        total = total * _BASE + mixed[k : len(codes) - length + 1 + k]
    return total


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file or folder of text; of a line of conversation its messages joined."""
    files, _ = find_files(path)
    for file in files:
        yield from _texts(file)


def _texts(file: SourceFile) -> Iterator[str]:
    if file.format == "parquet":
        yield from parquet_texts(file)
    elif file.format == "text":
        yield from text_documents(file)
    else:
        first = next((row for _, row in json_lines(file)), {})
        if any(name in first for name in TEXT_FIELDS):
            yield from jsonl_texts(file)
        else:
            yield from (" ".join(_strings(row)) for _, row in json_lines(file))


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
