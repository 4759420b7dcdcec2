"""Learning merges from many files: bounded memory, progress, and going on where it stopped.

`fledge tok train` calls `train_from_shards`. Pieces are counted shard by shard by the Rust counter,
which spills to disk what memory should not hold; between shards the counts are saved beside the
tokenizer to be, with the list of shards that are in them. Counts do not depend on the order of the
shards, so a training that was stopped and run again gives the same merges. Without the Rust module
the reference trains in one go, with nothing to resume. It never decides which files are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fledge import files
from fledge.errors import UserError
from fledge.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer, check_vocabulary, engine, utf8

SAVE_EVERY_SECONDS = 20.0
STATE_FOLDER = "train_state"
_EDGE = 1 << 20
_FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A file of text: its name, its size on disk, how to read it."""

    name: str
    path: Path
    texts: Callable[[], Iterable[str]]

    def identity(self) -> list[Any]:
        """Name, bytes and a digest of the first and last MiB: tells an edited file from the old."""
        size = self.path.stat().st_size
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
        return [self.name, size, digest.hexdigest()]


Report = Callable[[str, float, float], None]  # (phase "count" or "merge", done, total)


def train_from_shards(
    shards: Sequence[Shard],
    folder: Path,
    *,
    vocab_size: int,
    pattern: str,
    threads: int | None = None,
    report: Report = lambda phase, done, total: None,
    note: Callable[[str], None] = lambda text: None,
    save_every: float = SAVE_EVERY_SECONDS,
) -> Tokenizer:
    """A tokenizer learnt from all shards and saved in `folder`; the same for any order of them.

    What was counted is kept in `folder/train_state` until the tokenizer is there. `report` hears of
    bytes on disk while counting, then of merges. Raises UserError for an impossible vocabulary.
    """
    counter_of = getattr(engine(), "Counter", None)
    sizes = {shard.name: shard.path.stat().st_size for shard in shards}
    if counter_of is None:
        texts = (text for shard in shards for text in shard.texts())
        tokenizer = Tokenizer.train(texts, vocab_size, pattern, threads=threads)
        tokenizer.save(folder)
        return tokenizer
    num_merges = check_vocabulary(vocab_size, pattern, SPECIAL_TOKENS)  # before hours of counting
    state = _State(folder / STATE_FOLDER, pattern)
    counter = counter_of(pattern, threads, spill_folder=state.spill_folder())
    try:
        done = state.restore(counter, [shard.identity() for shard in shards])
        if done:
            note(f"going on: {len(done)} of {len(shards)} files are counted already")
        _count(shards, done, counter, state, sizes=sizes, report=report, save_every=save_every)
        if not counter.num_bytes:
            raise UserError(
                "there is no text to learn from",
                f"{len(shards)} files were read and hold nothing",
                "give files with text in them",
            )
        merges = counter.learn(num_merges, progress=report)
    except BaseException:  # Ctrl-C too
        state.clean_up()
        raise
    tokenizer = Tokenizer.from_merges(merges, pattern, vocab_size=vocab_size)
    tokenizer.save(folder)
    state.remove()
    return tokenizer


def _count(
    shards: Sequence[Shard],
    done: set[str],
    counter: Any,
    state: _State,
    *,
    sizes: dict[str, int],
    report: Report,
    save_every: float,
) -> None:
    """Counts every shard that is not done; saves now and then."""
    total, finished = sum(sizes.values()), sum(sizes[name] for name in done)
    last_save = time.monotonic()
    for shard in shards:
        if shard.name in done:
            continue
        per_byte = finished / counter.num_bytes if counter.num_bytes else 1.0
        start, limit = finished, sizes[shard.name]

        def progress(phase: str, bytes_: int, _: object, *, at=start, most=limit, per=per_byte):
            report(phase, at + min(most, bytes_ * per), total)

        counter.add(utf8(shard.texts()), progress=progress)
        finished += limit
        state.done.append(shard.identity())
        report("count", finished, total)
        if time.monotonic() - last_save >= save_every:
            state.save(counter)
            last_save = time.monotonic()


class _State:
    """The saved counts: `state.json` names the shards and the file of counts that holds them."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder = folder
        self.pattern = pattern
        self.done: list[list[Any]] = []

    def spill_folder(self) -> Path:
        """A place on the same disk for what memory should not hold."""
        folder = self.folder / "spill"
        with files.refusals(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def restore(self, counter: Any, shards: list[list[Any]]) -> set[str]:
        """Loads the counts of a training that was stopped; the names of the shards in them.

        UserError if they were made of other files or with another pattern, or are damaged.
        """
        path = self.folder / "state.json"
        if not path.exists():
            return set()
        fix = f"remove {self.folder} to count from the start"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            done, name = state["done"], state["counts"]
            settings = (state["format"], state["pattern"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read", str(error), fix) from None
        if settings != (_FORMAT, self.pattern):
            raise UserError(
                f"{self.folder} holds a training that was stopped and does not fit",
                f"it split by {settings[1]!r}, and now it is {self.pattern!r}",
                f"give --pattern {settings[1]}, or {fix}",
            )
        strange = [row[0] for row in done if row not in shards]
        if strange:
            raise UserError(
                f"{self.folder} holds a training that was stopped, of other files",
                f"{strange[0]} is in its counts, and now it is missing or has changed",
                f"give the same files again, or {fix}",
            )
        try:
            counter.add_saved(self.folder / name)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name} cannot be read", str(error), fix) from None
        self.done = done
        return {row[0] for row in done}

    def save(self, counter: Any) -> None:
        """The new counts first, then the file that names them, then the old counts go."""
        name = f"counts-{len(self.done):06d}.bin"
        counter.save(self.folder / name)
        state = {
            "format": _FORMAT,
            "pattern": self.pattern,
            "counts": name,
            "done": self.done,
        }
        files.write_json(self.folder / "state.json", state)
        for old in self.folder.glob("counts-*.bin"):
            if old.name != name:
                old.unlink()

    def clean_up(self) -> None:
        """After a stop: only what the next training can use stays."""
        shutil.rmtree(self.folder / "spill", ignore_errors=True)
        for folder in (self.folder, self.folder.parent):
            with contextlib.suppress(OSError):  # not empty: it holds counts, or the user's files
                folder.rmdir()

    def remove(self) -> None:
        """The tokenizer is there; nothing is left to resume."""
        files.remove_whole(self.folder)
