"""A world written out as files: `fledge data make`.

The trainer needs none of this (it draws from the `World` itself); the files are for people and for
other programs. A folder appears whole or not at all. Called by the CLI; never trains and never
grades.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fledge.data.worlds.exams import SIZES
from fledge.data.worlds.world import Split, Stage, World, load_world
from fledge.errors import UserError

VAL_SHARE = 20  # one validation document per so many training documents
RL_SHARE = 2  # one rl problem per so many conversations


def make_world(
    name_or_csv: str, seed: int, out: Path, *, n_documents: int, n_conversations: int
) -> dict[str, Any]:
    """Write a world's corpus and exams to the new folder `out`; returns what world.json says.

    Raises UserError when the table has a fault, when `out` holds something, or when it cannot be
    written; then nothing is left behind.
    """
    world = load_world(name_or_csv, seed)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} exists already",
            "a world is written into a folder of its own, whole or not at all",
            "choose another --out, or remove that one first",
        )
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        summary = _write(world, temporary, n_documents, n_conversations)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(
            f"cannot write the world to {out}",
            error.strerror or str(error),
            "choose a folder on a disk with room that you may write to",
        ) from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
    return summary


def mixed(world: World, stage: Stage, n: int) -> Iterator[dict[str, Any]]:
    """n conversations of a stage in the default mixture."""
    for index in range(n):
        yield world.mixed(stage, index)


def _write(world: World, folder: Path, n_documents: int, n_conversations: int) -> dict[str, Any]:
    n_val = max(1, n_documents // VAL_SHARE)
    n_rl = max(1, n_conversations // RL_SHARE)
    counts = {
        "base.train.jsonl": _jsonl(
            folder / "base.train.jsonl", _texts(world, "train", n_documents)
        ),
        "base.val.jsonl": _jsonl(folder / "base.val.jsonl", _texts(world, "val", n_val)),
        "mid.jsonl": _jsonl(folder / "mid.jsonl", mixed(world, "mid", n_conversations)),
        "sft.jsonl": _jsonl(folder / "sft.jsonl", mixed(world, "sft", n_conversations)),
        "rl.jsonl": _jsonl(folder / "rl.jsonl", (world.problem(i) for i in range(n_rl))),
    }
    (folder / "exams").mkdir()
    for task in SIZES:
        name = f"exams/{task}.jsonl"
        counts[name] = _jsonl(folder / name, world.exam(task))
    summary = {
        **world.manifest(),
        "entropy_bits_per_byte": round(world.entropy_per_byte(n_documents=n_val), 4),
        "lines": counts,
        "notes": world.notes(),
    }
    text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
    _sync(folder / "world.json", text.encode("utf-8"))
    return summary


def _texts(world: World, split: Split, n: int) -> Iterator[dict[str, Any]]:
    for index in range(n):
        document = world.document(split, index)
        yield {"text": document.text, "bits": round(document.bits, 3)}


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _sync(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
