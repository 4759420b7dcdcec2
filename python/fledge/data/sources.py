"""A person's own text as training documents: files and folders in, train and validation out.

`fledge run laptop --data.source PATH` reads .txt, .md, .jsonl (each also as .gz or .zst) and
.parquet; `stages` opens the corpus, `fledge data stats` describes it. Files stream in bounded
memory; the documents that are kept stay in memory as UTF-8. Split and order follow from the content
of each document and the seed alone, never from file names or times. Every bad input is a
`UserError` that names file and place; nothing is skipped without a note. It never touches the
network, never writes, and never imports torch.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import json
import os
import re
import stat
import statistics
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, overload

from fledge.errors import UserError

DEFAULT_MAX_BYTES = 400_000_000  # of text kept in memory when the recipe names no limit
MIN_CORPUS_BYTES = 10_000
WHOLE_FILE_CHARS = 64 * 1024  # a .txt or .md up to here is one document
MIN_CUT_CHARS, MAX_CUT_CHARS = 4 * 1024, 16 * 1024  # size of the documents cut from longer ones
MAX_LINE_BYTES = 256 * 1024 * 1024  # of one JSON line
CHUNK_BYTES = 1 << 20
FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_FIELDS = ("text", "content")
USABLE = ".txt .md .jsonl (also .gz .zst) and .parquet"


@dataclass(frozen=True)
class SourceFile:
    """One readable file of a source; `relative` is its name inside the source, with slashes."""

    relative: str
    path: Path
    format: str
    compression: str | None
    size: int


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


# ------------------------------------------------------------------------------ finding the files


def find_files(path: str | Path) -> tuple[list[SourceFile], list[str]]:
    """The usable files of a file or folder, sorted by relative path, and notes on the others."""
    root = Path(path)
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise _unreachable(root, error) from None
    notes: list[str] = []
    if not is_folder:
        file = _source_file(root, root.name)
        if file is None:
            raise UserError(
                f"{root} is not a kind of file that holds training text",
                f"data.source takes {USABLE}",
                "convert the file, or name a folder with such files",
            )
        return [file], notes
    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    for relative, found in _walk(root):
        file = _source_file(found, relative)
        if file is None:
            skipped[found.suffix.lower() or "no suffix"] += 1
        else:
            files.append(file)
    if skipped:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(skipped.items()))
        notes.append(f"{sum(skipped.values())} files skipped, not {USABLE} ({kinds})")
    if not files:
        raise UserError(
            f"there is no usable file in the folder {root}",
            f"it holds {sum(skipped.values())} files, and data.source takes {USABLE}"
            if skipped
            else "it is empty",
            "put text files there or name another folder",
        )
    return sorted(files, key=lambda f: f.relative), notes


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative path, path) of all files below `root`; follows links, refuses loops."""
    pending = [(root, "", frozenset([root.resolve()]))]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    entry.stat()  # a broken or circular link shows itself here
                    yield prefix + entry.name, Path(entry.path)
                    continue
                real = Path(entry.path).resolve()
                if real in above:
                    raise UserError(
                        f"{entry.path} is a symbolic link to a folder that contains it",
                        "reading the folder would never end",
                        "remove that link",
                    )
                pending.append((Path(entry.path), prefix + entry.name + "/", above | {real}))
        except OSError as error:
            raise _unreachable(Path(error.filename or folder), error) from None


def _source_file(path: Path, relative: str) -> SourceFile | None:
    """The file as a source, or None if its name says it is something else."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    format_ = FORMATS.get(suffixes[-1]) if suffixes else None
    if format_ is None or (compression and format_ == "parquet") or not path.is_file():
        return None
    return SourceFile(relative, path, format_, compression, path.stat().st_size)


def _unreachable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"{path} does not exist", "data.source must name a file or folder", "check the path"
        )
    if error.errno == errno.ELOOP:
        return UserError(
            f"{path} is a symbolic link that leads back to itself",
            "there is no file at its end",
            "remove that link",
        )
    return UserError(
        f"cannot read {path}", error.strerror or str(error), "check the file and its permissions"
    )


# ---------------------------------------------------------------------------- reading one document


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
            raise _unreachable(file.path, error) from None
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


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_chunks(file: SourceFile) -> Iterator[bytes]:
    """The decompressed bytes of a file in pieces; a damaged archive is a UserError."""
    with open(file.path, "rb") as raw:
        stream: _Readable = raw
        if file.compression == "gzip":
            stream = gzip.GzipFile(fileobj=raw)
        elif file.compression == "zstd":
            import pyarrow  # not at the top: it takes 0.2 s

            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        while True:
            try:
                chunk = stream.read(CHUNK_BYTES)
            except (EOFError, zlib.error, OSError) as error:
                if file.compression is None:
                    raise
                raise UserError(
                    f"{file.path} is damaged or cut short",
                    f"{file.compression} says: {error}",
                    "fetch or compress the file again",
                ) from None
            if not chunk:
                return
            yield chunk


def read_lines(file: SourceFile) -> Iterator[tuple[int, bytes]]:
    """(1-based line number, line without its end) of a file."""
    number = 0
    pending: list[bytes] = []
    waiting = 0
    for chunk in read_chunks(file):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            number += 1
            yield number, b"".join([*pending, line]).rstrip(b"\r")
            pending, waiting = [], 0
        pending.append(rest)
        waiting += len(rest)
        if waiting > MAX_LINE_BYTES:
            raise UserError(
                f"{file.path}:{number + 1} is a line of more than {MAX_LINE_BYTES >> 20} MiB",
                "a .jsonl file holds one JSON object per line",
                "write each document on a line of its own",
            )
    if any(pending):
        yield number + 1, b"".join(pending)


def json_lines(file: SourceFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl file; a line that is no JSON object is a UserError."""
    for number, line in read_lines(file):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.path}:{number} is not valid UTF-8",
                f"byte {error.start + 1} of that line is 0x{line[error.start]:02x}",
                "save the file as UTF-8",
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file.path}:{number} is not valid JSON", str(error), "mend or remove that line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{file.path}:{number} is a JSON {type(row).__name__}, not an object",
                'each line must be an object such as {"text": "..."}',
                "mend or remove that line",
            )
        yield number, row


def jsonl_texts(file: SourceFile) -> Iterator[str]:
    """The `text` (or `content`) of every line."""
    for number, row in json_lines(file):
        name = next((name for name in TEXT_FIELDS if name in row), None)
        if name is None:
            raise UserError(
                f"{file.path}:{number} has no field `text` or `content`",
                f"its fields are {', '.join(map(repr, row)) or 'none'}",
                "rename the field that holds the text",
            )
        if not isinstance(row[name], str):
            raise UserError(
                f"{file.path}:{number}: `{name}` is {type(row[name]).__name__}, not a string",
                "a document is one string",
                "mend or remove that line",
            )
        yield row[name]


def parquet_texts(file: SourceFile) -> Iterator[str]:
    """The `text` (or `content`) column, row group by row group."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file.path) as table:
            schema = table.schema_arrow
            name = next((name for name in TEXT_FIELDS if name in schema.names), None)
            if name is None:
                raise UserError(
                    f"{file.path} has no column `text` or `content`",
                    f"its columns are {', '.join(schema.names) or 'none'}",
                    "rename the column that holds the text",
                )
            kind = schema.field(name).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(
                    f"{file.path}: the column `{name}` is {kind}, not string",
                    "a document is one string",
                    "write the column as strings",
                )
            for batch in table.iter_batches(batch_size=256, columns=[name]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{file.path} is not a readable Parquet file", str(error), "write or fetch it again"
        ) from None


def text_documents(file: SourceFile) -> Iterator[str]:
    """A short text file as one document, a longer one cut at blank lines as it streams by."""
    buffer, long = "", False
    for text in _decoded(file):
        buffer += text
        long = long or len(buffer) > WHOLE_FILE_CHARS
        start = 0
        while long and len(buffer) - start >= 2 * MAX_CUT_CHARS:
            end = _cut_point(buffer, start, MIN_CUT_CHARS, MAX_CUT_CHARS)
            yield buffer[start:end].strip("\n")
            start = end
        buffer = buffer[start:]
    yield from cut_text(buffer) if long else [buffer]


def cut_text(text: str, low: int = MIN_CUT_CHARS, high: int = MAX_CUT_CHARS) -> list[str]:
    """A long text in documents of `low` to `high` characters, cut where a paragraph ends.

    The last document may be shorter.
    """
    pieces, start = [], 0
    while len(text) - start > low + low // 2:
        end = _cut_point(text, start, low, high)
        pieces.append(text[start:end].strip("\n"))
        start = end
    pieces.append(text[start:].strip("\n"))
    return [piece for piece in pieces if piece.strip()]


_BLANK_LINE = re.compile(r"\n[ \t]*\n")


def _cut_point(text: str, start: int, low: int, high: int) -> int:
    """The end of a document that begins at `start`: a blank line, else a line, else a word."""
    first, last = start + low, min(start + high, len(text))
    blank = _BLANK_LINE.search(text, first, last)
    if blank is not None:
        return blank.end()
    for mark in ("\n", " "):
        found = text.rfind(mark, first, last)
        if found >= 0:
            return found + 1
    return last


def _decoded(file: SourceFile) -> Iterator[str]:
    """The text of a file in pieces, with \\n line ends; invalid UTF-8 is a UserError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    carriage = ""
    for i, chunk in enumerate(_with_end(read_chunks(file))):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file.path} is not valid UTF-8",
                f"byte {offset - held + error.start:,} is 0x{error.object[error.start]:02x}",
                "save the file as UTF-8, or take it out of the folder",
            ) from None
        offset += len(chunk or b"")
        text = carriage + (text.removeprefix("\ufeff") if i == 0 else text)
        carriage = "\r" if text.endswith("\r") and chunk is not None else ""
        text = text.removesuffix("\r") if carriage else text
        yield text.replace("\r\n", "\n")


def _with_end(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """The chunks and a last None, so that a decoder can be told of the end."""
    yield from chunks
    yield None


def _hash(key: bytes, data: bytes) -> int:
    """A 64-bit hash that another seed scrambles."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key[:64]).digest(), "little")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
