"""`fledge data overlap`: exam questions in training text, of a run or of any files.

Opens the text and the tasks and keeps a run's result where its report finds it; the search itself
is `data.overlap`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fledge import files
from fledge.data.overlap import read_texts
from fledge.data.sources import open_corpus
from fledge.data.task_files import TaskData
from fledge.errors import UserError
from fledge.evals.contamination import find_overlap
from fledge.evals.tasks.core import CORE
from fledge.evals.tasks.registry import TASKS, find_tasks
from fledge.run import Run


def measure(
    paths: Sequence[Path], names: Sequence[str] | None, *, data_root: str | None, words: int
) -> dict[str, Any]:
    """The table of `find_overlap`; written into the run if one run is given."""
    runs = [Run.read(path) for path in paths if Run.is_run(path)]
    if runs and len(paths) > 1:
        raise UserError(
            "a run and other text at once", "the result belongs to one of them", "name one run"
        )
    data = TaskData(data_root or (runs[0].values["data.root"] if runs else None))
    asked = names if names is not None else [*(t for t in TASKS if t != "chat"), CORE]
    tasks, notes = find_tasks(data, list(asked))
    if not tasks:
        raise UserError(
            "there are no exam questions to look for",
            "; ".join(notes),
            "put task files under FLEDGE_DATA, or name their folder with --data-root",
        )
    texts = (
        training_texts(runs[0]) if runs else itertools.chain.from_iterable(map(read_texts, paths))
    )
    table = find_overlap(texts, tasks, words=words) | {"notes": notes}
    if runs:
        files.write_json(runs[0].overlap_file, table)
    return table


def training_texts(run: Run) -> Iterator[str]:
    """The documents that a run's base stage was trained on, and the conversation files after it."""
    data = run.recipe.data
    if data.source is None:
        raise UserError(
            f"{run.path} was trained on a world",
            "a world writes its text anew from its facts; no real exam is in it",
            "give a run that was trained on text (data.source)",
        )
    corpus = open_corpus(
        data.source, seed=data.seed, val_fraction=data.val_fraction, max_bytes=data.max_bytes
    )
    yield from corpus.one_epoch(data.seed)
    chats = Path(data.root) / "sft" if data.root else None
    if chats is not None and chats.is_dir():
        yield from read_texts(chats)
    for stage in ("mid", "sft"):
        for path in getattr(run.recipe, stage).files:
            yield from read_texts(Path(path))


def text(table: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{table['documents']:,} documents, {table['bytes'] / 1e6:,.1f} MB; a question counts when "
        f"{table['words']} words in a row occur in one of them",
        "",
        f"{'task':<38} {'questions':>9} {'found':>7} {'share':>8} {'too short':>10}",
    ]
    for name, row in table["tasks"].items():
        lines.append(
            f"{name:<38} {row['items']:>9,} {row['overlapped']:>7,} {100 * row['share']:>7.2f}% "
            f"{row['too_short']:>10,}"
        )
    for name, row in table["tasks"].items():
        lines += [f"  {name}: {e['id']}: {e['words']}" for e in row["examples"]]
    return "\n".join([*lines, *table["notes"]])
