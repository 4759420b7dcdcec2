"""A person's own text as training documents: files and folders in, train and validation out.

`fledge run laptop --data.source PATH` comes here; `stages` opens the corpus, `fledge data stats`
describes it. `data.text_files` reads the files; the documents that are kept stay in memory as
UTF-8. Split and order follow from the content of each document and the seed alone, never from file
names or times; nothing is skipped without a note. It never touches the network, never writes, and
never imports torch.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from fledge.data.text_files import (
    MAX_CUT_CHARS,
    MIN_CUT_CHARS,
    SourceFile,
    cut_text,
    find_files,
    jsonl_texts,
    parquet_texts,
    text_documents,
    unreachable,
)
from fledge.errors import UserError

DEFAULT_MAX_BYTES = 400_000_000  # of text kept in memory when the recipe names no limit
MIN_CORPUS_BYTES = 10_000


class Texts(Sequence[str]):
    """An immutable list of documents, held as UTF-8 bytes (a third of the memory of str)."""

    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Texts: ...
    def __getitem__(self, index: int | slice) -> str | Texts:
        if isinstance(index, slice):
            return Texts(self._encoded[index])
        return self._encoded[index].decode("utf-8")

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return sum(map(len, self._encoded))


@dataclass(frozen=True)
class Corpus:
    """Documents split into `train` and `val`, and what a person should know about the reading."""

    train: Texts
    val: Texts
    notes: list[str]
    files: list[SourceFile]  # those that were read

    def manifest(self) -> list[tuple[str, int, str]]:
        """(relative path, bytes, sha256) of every file that was read, sorted by path."""
        return sorted((f.relative, f.size, _sha256(f.path)) for f in self.files)


def open_corpus(
    path: str | Path, *, seed: int = 0, val_fraction: float = 0.01, max_bytes: int | None = None
) -> Corpus:
    """The documents of a file or folder in a seeded order, split by their content.

    Keeps at most `max_bytes` of text (default 400 MB): files are read in a seeded order until then.
    Documents that repeat another one byte for byte are dropped and counted. `val` holds about
    `val_fraction` of the documents, at least one. Raises UserError for every fault of the input.
    """
    files, notes = find_files(path)
    key = str(seed).encode()
    limit = DEFAULT_MAX_BYTES if max_bytes is None else max_bytes
    order = sorted(files, key=lambda f: (_hash(key, f.relative.encode()), f.relative))
    reader = _Reader(notes)
    found: dict[int, bytes] = {}
    read: list[SourceFile] = []
    total = repeated = 0
    for file in order:
        if total >= limit:
            break
        read.append(file)
        for text in reader.documents(file):
            if total >= limit:
                break
            encoded = text.encode("utf-8")
            identity = _hash(key, encoded)
            if identity in found:
                repeated += 1
                continue
            found[identity] = encoded
            total += len(encoded)
    if total >= limit:
        why = "data.max_bytes" if max_bytes is not None else "the default of data.max_bytes"
        notes.append(
            f"read {total / 1e6:.1f} MB from {len(read)} of {len(files)} files, then stopped: {why}"
        )
    if repeated:
        notes.append(f"{repeated} documents dropped: exact copies of others")
    reader.finish()
    if total < MIN_CORPUS_BYTES:
        raise UserError(
            f"{path} holds {total:,} bytes of text",
            f"a model needs more to learn from; the least that makes sense is {MIN_CORPUS_BYTES:,}",
            "add files, or leave data.source out to train on a built-in world",
        )
    if len(found) == 1:  # one short file: cut it, so that there is something to validate on
        (only,) = found.values()
        text = only.decode("utf-8")
        low, high = min(MIN_CUT_CHARS, len(text) // 4), min(MAX_CUT_CHARS, len(text) // 2)
        pieces = [piece.encode("utf-8") for piece in cut_text(text, low, high)]
        found = {_hash(key, piece): piece for piece in pieces}
    if len(found) == 1:
        raise UserError(
            f"{path} holds one document over and over",
            "training and validation need different text",
            "add other text",
        )
    train, val = _split(found, val_fraction)
    return Corpus(train=train, val=val, notes=notes, files=sorted(read, key=lambda f: f.relative))


def _split(found: dict[int, bytes], val_fraction: float) -> tuple[Texts, Texts]:
    """Documents by ascending hash: the lowest `val_fraction` validate, the others train."""
    order = sorted(found)
    bound = val_fraction * 2.0**64
    cut = sum(1 for identity in order if identity < bound)
    cut = min(max(cut, 1), len(order) - 1)
    texts = [found[identity] for identity in order]
    return Texts(texts[cut:]), Texts(texts[:cut])


def describe(path: str | Path) -> dict[str, Any]:
    """Counts and sizes of a source for `fledge data stats`; reads all of it once."""
    files, notes = find_files(path)
    reader = _Reader(notes)
    lengths: list[int] = []
    sources = []
    for file in files:
        before = len(lengths)
        lengths.extend(len(text.encode("utf-8")) for text in reader.documents(file))
        sources.append(
            {
                "path": file.relative,
                "file_bytes": file.size,
                "documents": len(lengths) - before,
                "text_bytes": sum(lengths[before:]),
            }
        )
    reader.finish()
    return {
        "path": str(path),
        "files": len(files),
        "documents": len(lengths),
        "text_bytes": sum(lengths),
        "document_bytes": {
            "shortest": min(lengths, default=0),
            "median": int(statistics.median(lengths)) if lengths else 0,
            "longest": max(lengths, default=0),
        },
        "sources": sources,
        "notes": notes,
    }


@dataclass
class _Reader:
    """Streams the documents of files and counts what it had to pass over."""

    notes: list[str]
    empty: int = 0
    surrogates: int = 0
    empty_files: list[str] = field(default_factory=list)

    def documents(self, file: SourceFile) -> Iterator[str]:
        """The documents of one file, without empty ones; any fault is a UserError."""
        texts = {"text": text_documents, "jsonl": jsonl_texts, "parquet": parquet_texts}
        count = 0
        try:
            for text in texts[file.format](file):
                if not text.strip():
                    self.empty += 1
                    continue
                count += 1
                yield self._encodable(text)
        except OSError as error:
            raise unreachable(file.path, error) from None
        if not count:
            self.empty_files.append(file.relative)

    def _encodable(self, text: str) -> str:
        """JSON can spell half a surrogate pair, which is no text; it becomes U+FFFD."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.surrogates += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def finish(self) -> None:
        """Writes the counts into the notes."""
        if self.empty:
            self.notes.append(f"{self.empty} empty documents left out")
        if self.empty_files:
            shown = ", ".join(self.empty_files[:3]) + (" ..." if self.empty_files[3:] else "")
            self.notes.append(f"{len(self.empty_files)} files without text: {shown}")
        if self.surrogates:
            self.notes.append(f"{self.surrogates} documents held half characters (now U+FFFD)")


def _hash(key: bytes, data: bytes) -> int:
    """A 64-bit hash that another seed scrambles."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key[:64]).digest(), "little")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
