"""The text that base learns from: a person's own files, or a corpus on the Hugging Face hub.

`open_corpus` takes what `data.source` names; `stages` calls it, `fledge data` the rest.
Three forms, one interface: text that fits into memory is kept there as UTF-8; a larger folder is
written once as Parquet shards under FLEDGE_HOME; a corpus of the hub stays there, shard by shard
until it is reached. Split and order follow from the documents, the row groups and the seed alone,
never from file names or times; nothing is skipped without a note. It imports no torch, and touches
the network only through `data.hub`.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from fledge import files as disk
from fledge.data import hub
from fledge.data.shards import Shard, ShardedTexts, ShardWriter, local_shards
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
from fledge.data.tokenized import Epochs
from fledge.errors import UserError

DEFAULT_MAX_BYTES = 400_000_000  # of text kept in memory when the recipe names no limit
MIN_CORPUS_BYTES = 10_000
SHARD_BYTES = 128_000_000  # of text in a shard that we write
VALIDATION_BYTES = 20_000_000  # of text kept in memory to validate on, of a corpus in shards
UNPACKED = 4  # a compressed file's text is taken for so many times its size (zstd of English: 3)
HUB = "hub:"
# corpora that nanochat pretrains on: shuffled beforehand, the last shard validates
KNOWN_CORPORA = {
    "fineweb-edu": "karpathy/fineweb-edu-100b-shuffle",
    "climbmix": "karpathy/climbmix-400b-shuffle",
}


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

    train: Texts | list[Shard]
    val: Texts
    notes: list[str]
    manifest: Callable[[], list[list[Any]]]  # what exactly was read, in sorted order
    stored_bytes: int | None = None  # of its files, as the hub stores them (zstd Parquet)

    def order(self, split: str, seed: int) -> Callable[[int], str]:
        """Document i of an endless order, shuffled anew every epoch."""
        texts = self.train if split == "train" else self.val
        return Epochs(texts, seed) if isinstance(texts, Texts) else ShardedTexts(texts, seed)

    def size(self) -> dict[str, int]:
        """How much there is to train on, as far as it is known without reading it: documents and
        bytes of text, or shards and bytes of files."""
        if isinstance(self.train, Texts):
            return {"documents": len(self.train), "bytes": self.train.bytes}
        stored = {} if self.stored_bytes is None else {"stored_bytes": self.stored_bytes}
        return {"shards": len(self.train)} | stored

    def one_epoch(self, seed: int) -> Iterator[str]:
        """Every training document once."""
        if isinstance(self.train, Texts):
            return iter(self.train)
        return ShardedTexts(self.train, seed).one_epoch()


def open_corpus(
    source: str | Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.01,
    max_bytes: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """The documents of a file, a folder or a corpus of the hub, split into train and validation.

    `max_bytes` limits how much of it is used. `tell` hears of work that takes minutes. Raises
    UserError for every fault of the input.
    """
    if is_hub_name(str(source)):
        return _hub_corpus(str(source), max_bytes)
    files, notes = find_files(source)
    text_bytes = sum(f.size * (UNPACKED if _packed(f) else 1) for f in files)
    if max_bytes is None and text_bytes > DEFAULT_MAX_BYTES:
        return _sharded_corpus(files, notes, text_bytes, seed, val_fraction, tell)
    return _memory_corpus(
        str(source), files, notes, seed, val_fraction, max_bytes or DEFAULT_MAX_BYTES
    )


def _packed(file: SourceFile) -> bool:
    return file.compression is not None or file.format == "parquet"


def _manifest(files: Sequence[SourceFile]) -> list[list[Any]]:
    """[relative path, bytes, sha256] of every file that was read, sorted by path."""
    return sorted([f.relative, f.size, _sha256(f.path)] for f in files)


def _memory_corpus(
    name: str,
    files: list[SourceFile],
    notes: list[str],
    seed: int,
    val_fraction: float,
    limit: int,
) -> Corpus:
    """Up to `limit` bytes of text in memory: files are read in a seeded order until then.

    Documents that repeat another one byte for byte are dropped and counted. `val` holds about
    `val_fraction` of the documents, at least one.
    """
    key = str(seed).encode()
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
        notes.append(
            f"read {total / 1e6:.1f} MB from {len(read)} of {len(files)} files, then stopped: "
            "data.max_bytes"
        )
    if repeated:
        notes.append(f"{repeated} documents dropped: exact copies of others")
    reader.finish()
    _require_enough(name, total)
    if len(found) == 1:  # one short file: cut it, so that there is something to validate on
        (only,) = found.values()
        text = only.decode("utf-8")
        low, high = min(MIN_CUT_CHARS, len(text) // 4), min(MAX_CUT_CHARS, len(text) // 2)
        pieces = [piece.encode("utf-8") for piece in cut_text(text, low, high)]
        found = {_hash(key, piece): piece for piece in pieces}
    if len(found) == 1:
        raise UserError(
            f"{name} holds one document over and over",
            "training and validation need different text",
            "add other text",
        )
    train, val = _split(found, val_fraction)
    return Corpus(train, val, notes, lambda: _manifest(read))


def _require_enough(name: str, total: int) -> None:
    if total < MIN_CORPUS_BYTES:
        raise UserError(
            f"{name} holds {total:,} bytes of text",
            f"a model needs more to learn from; the least that makes sense is {MIN_CORPUS_BYTES:,}",
            "add files, or leave data.source out to train on a built-in world",
        )


def _sharded_corpus(
    files: list[SourceFile],
    notes: list[str],
    text_bytes: int,
    seed: int,
    val_fraction: float,
    tell: Callable[[str], None],
) -> Corpus:
    """All of the text as Parquet shards under FLEDGE_HOME, written the first time it is asked for.

    Each shard is a random sample of the documents, so that reading one after the other mixes them.
    Memory holds a hash of every document, to drop exact copies.
    """
    tell(f"the text is larger than memory should hold ({text_bytes / 1e9:.1f} GB): hashing it")
    manifest = _manifest(files)
    asked = disk.canonical_json([manifest, seed, val_fraction])
    folder = hub.home() / "corpora" / hashlib.sha256(asked.encode()).hexdigest()[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        disk.require_free_bytes(folder, text_bytes // 2, purpose="the text as shards")
        with disk.atomic_directory(folder) as target:
            counts = _write_shards(files, notes, text_bytes, seed, val_fraction, target, tell)
            disk.write_json(target / "notes.json", counts)
    kept = disk.read_json(folder / "notes.json", fix=f"remove {folder}")
    val = Texts([text.encode() for text in parquet_texts(_shard_file(folder / "val.parquet"))])
    notes = [*kept["notes"], f"{kept['documents']:,} documents in shards under {folder}"]
    shards = local_shards(folder / "train")
    stored = sum(shard.path().stat().st_size for shard in shards)
    return Corpus(shards, val, notes, lambda: manifest, stored)


def _write_shards(
    files: list[SourceFile],
    notes: list[str],
    text_bytes: int,
    seed: int,
    val_fraction: float,
    target: Path,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    key = str(seed).encode()
    (target / "train").mkdir()
    reader, seen = _Reader(notes), set[int]()
    total = validation = repeated = 0
    val: list[str] = []
    with ShardWriter(target / "train", max(1, text_bytes // SHARD_BYTES)) as writer:
        for number, file in enumerate(files):
            tell(f"writing shards: file {number + 1} of {len(files)}, {total / 1e9:.2f} GB so far")
            for text in reader.documents(file):
                encoded = text.encode("utf-8")
                identity = _hash(key, encoded)
                if identity in seen:
                    repeated += 1
                    continue
                seen.add(identity)
                total += len(encoded)
                # the lowest hashes validate, as in memory; the rest of the hash picks the shard
                if identity < val_fraction * 2.0**64 and validation < VALIDATION_BYTES:
                    val.append(text)
                    validation += len(encoded)
                else:
                    writer.add(identity, text)
    if repeated:
        notes.append(f"{repeated} documents dropped: exact copies of others")
    reader.finish()
    _require_enough("data.source", total)
    if not val:
        raise UserError(
            "no document was left to validate on",
            f"data.val_fraction = {val_fraction} of {len(seen)} documents is none",
            "raise data.val_fraction",
        )
    with ShardWriter(target, 1) as writer:
        for text in val:
            writer.add(0, text)
    (target / "shard_00000.parquet").rename(target / "val.parquet")
    return {"notes": notes, "documents": len(seen)}


def _shard_file(path: Path) -> SourceFile:
    return SourceFile(path.name, path, "parquet", None, path.stat().st_size)


def is_hub_name(source: str) -> bool:
    """Whether `data.source` names a corpus of the hub and not a path of this machine."""
    return source.startswith(HUB) or (source in KNOWN_CORPORA and not Path(source).exists())


def _hub_corpus(source: str, max_bytes: int | None) -> Corpus:
    """The Parquet files of OWNER/NAME[/FOLDER][@REVISION]; the last one by name validates.

    `max_bytes` (of files, as the hub stores them) limits how many of the shards are used.
    """
    name = KNOWN_CORPORA.get(source, source.removeprefix(HUB))
    path, _, revision = name.partition("@")
    owner, _, rest = path.partition("/")
    repository, _, folder = rest.partition("/")
    listing = hub.listing(f"{owner}/{repository}", revision or "main")
    found = [(n, size) for n, size in listing.files if n.endswith(".parquet")]
    found = [(n, size) for n, size in found if not folder or n.startswith(folder + "/")]
    if len(found) < 2:
        raise UserError(
            f"{name} has {len(found)} Parquet files on the hub",
            "at least two are needed: the last one validates, the others train",
            "name OWNER/NAME of a data set with Parquet files, or download it and give its folder",
        )
    sizes = [*itertools.accumulate(size for _, size in found[:-1])]
    used = len(sizes)
    if max_bytes is not None:
        used = max(1, sum(1 for total in sizes if total <= max_bytes))

    def shard(file: str) -> Shard:
        def path() -> Path:
            return hub.fetch(listing.repository, [file], listing.commit, wait=True)[0]

        return Shard(file, path)

    last = shard(found[-1][0])
    val, total = [], 0
    for text in parquet_texts(_shard_file(last.path())):
        val.append(text.encode("utf-8"))
        total += len(val[-1])
        if total >= VALIDATION_BYTES:
            break
    notes = [
        f"{listing.repository} at {listing.commit[:12]}: {used:,} of {len(sizes):,} training "
        f"shards ({sizes[used - 1] / 1e9:.1f} GB), each fetched when it is reached; "
        f"validation on {total / 1e6:.0f} MB of {last.name}"
    ]
    shards = [shard(file) for file, _ in found[:used]]
    manifest = [[listing.repository, listing.commit, used]]
    return Corpus(shards, Texts(val), notes, lambda: manifest, sizes[used - 1])


def _split(found: dict[int, bytes], val_fraction: float) -> tuple[Texts, Texts]:
    """Documents by ascending hash: the lowest `val_fraction` validate, the others train."""
    order = sorted(found)
    bound = val_fraction * 2.0**64
    cut = sum(1 for identity in order if identity < bound)
    cut = min(max(cut, 1), len(order) - 1)
    texts = [found[identity] for identity in order]
    return Texts(texts[cut:]), Texts(texts[:cut])


def download(source: str, shards: int) -> Iterator[Path]:
    """Fetches what a run on a corpus of the hub reads first: validation, then `shards` shards."""
    if not is_hub_name(source):
        raise UserError(
            f"{source} is no corpus of the hub",
            f"known by name are {', '.join(KNOWN_CORPORA)}; others are {HUB}OWNER/NAME",
            "name one of those",
        )
    corpus = _hub_corpus(source, None)  # which fetches the shard that validates
    assert isinstance(corpus.train, list)
    for shard in corpus.train[:shards]:
        yield shard.path()


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
