"""What an exam leaves behind, example by example, and how an interrupted one goes on.

`examine_in_chunks` works through a task in chunks of like length and appends each chunk's records
to a partial file as soon as they exist; a chunk that is there already is not computed again. What
is computed together depends on the task alone, so an interrupted exam and one over several ranks
end with the very same records. `Store` keeps a task's result and records in one folder under a key
(model hash, task hash): what was computed once is read back. Called by `examine`, `core_exam` and
`suite`. It scores nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge import files
from fledge.dist import World

FORMAT = 2  # of records and scores: raise it when a change of code changes scores
CHUNK = 256  # examples between two savings
UNIT = 32  # of a chunk that are scored together, by one rank

Record = dict[str, Any]


def digest(value: Any) -> str:
    """A short hash of anything JSON can write."""
    return hashlib.sha256(files.canonical_json(value).encode()).hexdigest()[:16]


def model_hash(folder: Path, dtype: str = "float32") -> str:
    """A hash of the weights, the shape and the tokenizer of a checkpoint folder.

    dtype: what it computes in; another than float32 is another model, for it scores otherwise.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json"):
            with open(path, "rb") as file:
                whole.update(path.name.encode())
                whole.update(hashlib.file_digest(file, "sha256").digest())
    whole.update(b"" if dtype == "float32" else dtype.encode())
    return whole.hexdigest()[:16]


class Store:
    """Results of one model in one folder: TASK.json, TASK.samples.jsonl, TASK.partial.jsonl."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model

    def key(self, task: Any) -> str:
        """The key of a task's result: the model, the task (anything JSON can write), the format."""
        return digest([FORMAT, self.model, task])

    def result_file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def samples_file(self, name: str) -> Path:
        return self.folder / f"{name}.samples.jsonl"

    def partial_file(self, name: str) -> Path:
        return self.folder / f"{name}.partial.jsonl"

    def read(self, name: str, key: str) -> tuple[dict[str, Any], list[Record]] | None:
        """(result, records) of a finished exam under this key, or None."""
        try:
            result = json.loads(self.result_file(name).read_text(encoding="utf-8"))
            records = read_records(self.samples_file(name))
        except (OSError, ValueError):
            return None
        whole = isinstance(result, dict) and result.get("key") == key
        if not whole or len(records) != result.get("n"):
            return None
        self.partial_file(name).unlink(missing_ok=True)  # killed just before `write` did it
        return result, records

    def write(self, name: str, key: str, result: Mapping[str, Any], records: list[Record]) -> None:
        """Keep a finished exam; the result comes last and says that the records are whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_text(self.samples_file(name), jsonl(records))
        files.write_json(self.result_file(name), {"task": name, **result, "key": key})
        self.partial_file(name).unlink(missing_ok=True)


def jsonl(records: Sequence[Record]) -> str:
    """Records as lines of JSON."""
    return "".join(
        json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records
    )


def read_records(path: Path) -> list[Record]:
    """The records of a file; a last line that a crash cut short is left out."""
    found = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def examine_in_chunks(
    sizes: Sequence[int],
    score: Callable[[list[int]], list[Record]],
    *,
    unit: int | None = UNIT,
    partial: Path | None = None,
    key: str = "",
    world: World | None = None,
    after_chunk: Callable[[int], None] | None = None,
) -> dict[int, Record]:
    """Record by index of every example, longest first; `score` gets indices.

    `sizes` are the lengths of the examples. With `partial` the records are appended there and those
    found there under the same key are taken over. `after_chunk` gets the number of examples done
    so far and may raise to stop: everything until then is kept.

    In a `world` of several ranks the units of a chunk go round among them; all get all records, the
    leader alone keeps `partial`, and `after_chunk` is called on each. `unit`: how many examples
    `score` gets at a time; None where their results do not depend on each other: all that a rank
    has of a chunk.
    """
    world = world or World()
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    chunks = [order[i : i + CHUNK] for i in range(0, len(order), CHUNK)]
    partial = partial if world.leads else None
    found = world.tell(_taken_over(partial, key))
    if partial is not None and not found:
        partial.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(partial, json.dumps({"key": key}) + "\n")
    done = 0
    result: dict[int, Record] = {}
    for chunk in chunks:
        if not all(i in found for i in chunk):
            for part in world.all_of(_own_records(chunk, score, unit, world)):
                found |= part
            if partial is not None:
                lines = [{"index": i, "record": found[i]} for i in chunk]
                with files.refusals(partial), open(partial, "a", encoding="utf-8") as file:
                    file.write(jsonl(lines))
        result |= {i: found[i] for i in chunk}
        done += len(chunk)
        if after_chunk is not None:
            after_chunk(done)
    return result


def _own_records(
    chunk: list[int], score: Callable[[list[int]], list[Record]], unit: int | None, world: World
) -> dict[int, Record]:
    """The records of this rank's examples of a chunk."""
    if unit is None:
        mine = [chunk[world.rank :: world.size]]
    else:
        units = [chunk[i : i + unit] for i in range(0, len(chunk), unit)]
        mine = units[world.rank :: world.size]
    return {i: r for part in mine if part for i, r in zip(part, score(part), strict=True)}


def _taken_over(partial: Path | None, key: str) -> dict[int, Record]:
    if partial is None or not partial.is_file():
        return {}
    lines = read_records(partial)
    if not lines or lines[0].get("key") != key:
        return {}
    return {line["index"]: line["record"] for line in lines[1:] if "record" in line}
