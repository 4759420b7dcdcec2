"""Files of text: which of a folder's files hold any, and their documents one by one.

Reads .txt, .md, .jsonl (each also as .gz or .zst) and .parquet, streaming in bounded memory. Every
bad input is a `UserError` that names file and place. Called by `data.sources` (a corpus),
`data.conversations` and `data.task_files`. It knows nothing of splits and seeds, never touches the
network, never writes, and never imports torch.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fledge.errors import UserError

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


def find_files(path: str | Path) -> tuple[list[SourceFile], list[str]]:
    """The usable files of a file or folder, sorted by relative path, and notes on the others."""
    root = Path(path)
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise unreachable(root, error) from None
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
            raise unreachable(Path(error.filename or folder), error) from None


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


def unreachable(path: Path, error: OSError) -> UserError:
    """What to tell the user about a file that the system does not give."""
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
            name = text_column(file.path, table.schema_arrow)
            for batch in table.iter_batches(batch_size=256, columns=[name]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{file.path} is not a readable Parquet file", str(error), "write or fetch it again"
        ) from None


def text_column(path: Path, schema: Any) -> str:
    """The column of a Parquet schema that holds the documents; UserError if there is none."""
    import pyarrow

    name = next((name for name in TEXT_FIELDS if name in schema.names), None)
    if name is None:
        raise UserError(
            f"{path} has no column `text` or `content`",
            f"its columns are {', '.join(schema.names) or 'none'}",
            "rename the column that holds the text",
        )
    kind = schema.field(name).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(
            f"{path}: the column `{name}` is {kind}, not string",
            "a document is one string",
            "write the column as strings",
        )
    return name


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
