"""Where the real tasks' rows are: local files first, then the Hugging Face hub, else a sentence.

`TaskData(root)` looks for files such as gsm8k/train.jsonl.gz under `--data.root` or FLEDGE_DATA;
what is not there is taken from the hub's original files if that is allowed and reachable, or from
what an earlier run fetched. Rows come out in one shape whatever the origin. Used by
`data.conversations` (training) and `evals.tasks` (exams). It reads rows and keeps them; it never
judges an answer and never lacks a file in silence: `missing` tells in sentences.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from fledge.data import hub
from fledge.data.text_files import SourceFile, find_files, json_lines
from fledge.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
MAX_EXAMPLE_CHARS = 1_000_000  # of one row's text: more is a broken file, not a question
CORE_REPOSITORY = "FLEDGE_CORE_REPOSITORY"  # names a dataset on the hub that holds CORE's files
CORE_FOLDER = "core/eval_data/"
SMOLTALK = "sft/smoltalk"
SMOLTALK_REPOSITORY = "HuggingFaceTB/smol-smoltalk"  # nanochat's; columns messages and source
NOT_FOR_CHAT = ("preference_pairs", "fastchat_identity")  # pairs; another model's name in it


class JsonRows(Sequence[Row]):
    """A list of rows held as compact JSON and parsed on access: a third of the memory of dicts."""

    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    @classmethod
    def of(cls, rows: Iterator[Row]) -> JsonRows:
        return cls([json.dumps(row, ensure_ascii=False).encode("utf-8") for row in rows])

    def __len__(self) -> int:
        return len(self._encoded)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> JsonRows: ...
    def __getitem__(self, index: int | slice) -> Row | JsonRows:
        if isinstance(index, slice):
            return JsonRows(self._encoded[index])
        return json.loads(self._encoded[index])


@dataclass(frozen=True)
class HubFile:
    """The original of a task file; `convert` turns its row into the local shape."""

    repository: str
    name: str
    convert: Callable[[Row], Row]


def _same(row: Row) -> Row:
    return row


def _arc(row: Row) -> Row:
    labels = row["choices"]["label"]
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": row["choices"]["text"],
        "gold": labels.index(row["answerKey"]),
    }


def _hub_files() -> dict[str, HubFile]:
    """Local name -> the hub's original file."""

    def parquet(folder: str, split: str) -> str:
        return f"{folder}{split}-00000-of-00001.parquet"

    table = {
        f"gsm8k/{s}": HubFile("openai/gsm8k", parquet("main/", s), _same) for s in ("train", "test")
    }
    for split in ("auxiliary_train", "dev", "validation", "test"):
        table[f"mmlu/{split}"] = HubFile("cais/mmlu", parquet("all/", split), _same)
    for level, folder in (("easy", "ARC-Easy/"), ("challenge", "ARC-Challenge/")):
        for split in ("train", "validation", "test"):
            original = HubFile("allenai/ai2_arc", parquet(folder, split), _arc)
            table[f"arc/arc_{level}_{split}"] = original
    table["humaneval/HumanEval"] = HubFile(
        "openai/openai_humaneval", parquet("openai_humaneval/", "test"), _same
    )
    return table


def _core_file(name: str) -> HubFile | None:
    """CORE's file in a dataset of the hub that the user names; else None: nanochat's archive.

    The files have no home of their own on the hub: DCLM keeps them in its code repository
    (mlfoundations/dclm, eval/local_data), nanochat in an archive that `hub.core_bundle` fetches.
    """
    repository = os.environ.get(CORE_REPOSITORY)
    _, folder, path = name.partition("eval_data/")
    if not repository or not folder:
        return None
    return HubFile(repository, f"eval_data/{path}.jsonl", _same)


def require_rows(
    rows: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
    *,
    where: str,
    check: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> None:
    """UserError unless there are rows, all with the fields, each id once, none absurdly long.

    `check` says what else is wrong with a row. A broken row is never left out quietly: the score
    would be one of other questions.
    """
    if not len(rows):
        raise UserError(
            f"{where} holds no rows", "a score of no questions would mean nothing", "fetch it again"
        )
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows, start=1):
        wrong = _wrong_with(row, fields) or (check(row) if check is not None else None)
        if wrong is None and isinstance(row.get("id"), str | int):
            first = seen.setdefault(row["id"], number)
            if first != number:
                wrong = f"its id {row['id']!r} is also that of row {first}"
        if wrong is not None:
            raise UserError(
                f"row {number} of {where} cannot be used as a question",
                wrong,
                "correct the file, or fetch it again; no row is left out quietly",
            )


def _wrong_with(row: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    missing = [field for field in fields if field not in row]
    if missing:
        held = ", ".join(sorted(map(str, row))) or "nothing"
        return f"it lacks {' and '.join(map(repr, missing))}; it has {held}"
    size = sum(_chars(value) for value in row.values())
    if size > MAX_EXAMPLE_CHARS:
        return f"its text has {size:,} characters; more than {MAX_EXAMPLE_CHARS:,} is a broken file"
    return None


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_chars(v) for v in value.values())
    return sum(_chars(v) for v in value) if isinstance(value, list) else 0


class TaskData:
    """The rows of the real tasks by name, such as "gsm8k/train" or "sft/dolly_partial".

    `root` is the recipe's data.root; None means the environment's FLEDGE_DATA; without either only
    the hub is left. `use_hub=False` keeps to local files. `smoltalk` takes SmolTalk of the hub for
    the chats instead of the files in sft/, at most `max_chat_files` of its files.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        use_hub: bool = True,
        smoltalk: bool = False,
        max_chat_files: int | None = None,
    ) -> None:
        chosen = root or os.environ.get("FLEDGE_DATA") or None
        self.root = Path(chosen) if chosen else None
        if self.root is not None and not self.root.is_dir():
            where = "data.root" if root else "FLEDGE_DATA"
            raise UserError(
                f"{self.root} is not a folder",
                f"{where} must name the folder that holds gsm8k/, mmlu/, arc/, humaneval/, sft/",
                f"correct {where} or leave it out",
            )
        self.use_hub = use_hub
        self.smoltalk, self.max_chat_files = smoltalk, max_chat_files
        self._rows: dict[str, JsonRows | None] = {}
        self._origins: dict[str, tuple[str, int, str]] = {}
        self._missing: dict[str, str] = {}
        self._hub_answers = True  # until a request shows otherwise
        self._core_answers = True

    def rows(self, name: str) -> JsonRows | None:
        """All rows of a file, or None if it cannot be had; `missing` then says why."""
        if name not in self._rows:
            self._rows[name] = self._load(name)
        return self._rows[name]

    def has_file(self, name: str) -> bool:
        """Whether a local file of that name is there."""
        return self._local(name) is not None

    def names(self, folder: str) -> list[str]:
        """The names of the local files in a folder, sorted: names("sft") -> ["sft/...", ...]."""
        if folder == "sft" and self.smoltalk:
            return [SMOLTALK]
        place = self.root / folder if self.root else None
        if place is None or not place.is_dir():
            return []
        stems = {_stem(path.name) for path in place.iterdir()}
        return sorted(f"{folder}/{stem}" for stem in stems if stem is not None)

    def missing(self) -> list[str]:
        """A sentence for every file that was asked for and not found, in order of asking."""
        return list(self._missing.values())

    def why_missing(self, name: str) -> str:
        """The sentence about one file that `rows` could not give."""
        return self._missing.get(name, f"{name} holds no rows")

    def manifest(self) -> list[tuple[str, int, str]]:
        """(name or hub address, bytes, sha256) of every file that was used, sorted."""
        return sorted(self._origins.values())

    def _load(self, name: str) -> JsonRows | None:
        if name == SMOLTALK and self.smoltalk:
            return self._load_smoltalk()
        local = self._local(name)
        if local is not None:
            self._note_origin(name, local.path, local.relative)
            return JsonRows.of(row for _, row in json_lines(local))
        original = _hub_files().get(name) or _core_file(name)
        if original is None and self.use_hub and name.startswith(CORE_FOLDER):
            return self._load_core(name)
        if original is None or not self.use_hub:
            self._missing[name] = f"{name}.jsonl.gz is not under {self._where()}"
            return None
        path = self._fetch(name, original)
        if path is None:
            return None
        self._note_origin(name, path, f"hub:{original.repository}/{original.name}")
        if path.name.endswith(SUFFIXES):
            (file,), _ = find_files(path)
            return JsonRows.of(row for _, row in json_lines(file))
        return JsonRows.of(original.convert(row) for row in _parquet_rows(path))

    def _load_smoltalk(self) -> JsonRows:
        """Its training files by name. Never quietly without it: raises UserError."""
        listing = hub.listing(SMOLTALK_REPOSITORY)
        found = [n for n, _ in listing.files if "/train" in n and n.endswith(".parquet")]
        names = found[: self.max_chat_files]
        if not names:
            raise UserError(
                f"{SMOLTALK_REPOSITORY} has no data/train-*.parquet",
                "its files were renamed since",
                "leave data.chats out and put chats under data.root",
            )

        def rows() -> Iterator[Row]:
            for number, name in enumerate(names):
                (path,) = hub.fetch(listing.repository, [name], listing.commit)
                shown = f"hub:{listing.repository}/{name}"
                self._note_origin(f"{SMOLTALK}#{number}", path, shown)
                yield from _parquet_rows(path)

        return JsonRows.of(rows())

    def _load_core(self, name: str) -> JsonRows | None:
        """A file of CORE from nanochat's archive."""
        why = f"{name}.jsonl.gz is not under {self._where()}, and "
        if not self._core_answers:
            self._missing[name] = why + "CORE's archive could not be had"
            return None
        try:
            path = hub.core_bundle() / (name.removeprefix(CORE_FOLDER) + ".jsonl")
        except UserError as error:
            self._core_answers = False
            self._missing[name] = f"{why}{error.what}: {error.why}"
            return None
        if not path.is_file():
            self._missing[name] = f"{why}CORE's archive has no {path.name}"
            return None
        self._note_origin(name, path, f"core:{name.removeprefix(CORE_FOLDER)}.jsonl")
        (file,), _ = find_files(path)
        return JsonRows.of(row for _, row in json_lines(file))

    def _local(self, name: str) -> SourceFile | None:
        for suffix in SUFFIXES if self.root else ():
            assert self.root is not None
            path = self.root / f"{name}{suffix}"
            if path.is_file():
                (file,), _ = find_files(path)
                return SourceFile(name + suffix, path, file.format, file.compression, file.size)
        return None

    def _fetch(self, name: str, original: HubFile) -> Path | None:
        try:
            (path,) = hub.fetch(original.repository, [original.name], network=self._hub_answers)
            return path
        except UserError as error:
            self._hub_answers = self._hub_answers and not error.why.endswith(hub.UNREACHABLE)
            self._missing[name] = (
                f"{name}.jsonl.gz is not under {self._where()}, "
                f"and {original.repository} on the hub: {error.why.rsplit(', and ', 1)[-1]}"
            )
            return None

    def _where(self) -> str:
        return str(self.root) if self.root else "data.root or FLEDGE_DATA (neither is set)"

    def sha256(self, name: str) -> str | None:
        """The digest of a file that `rows` gave, None of one that it did not."""
        return self._origins[name][2] if name in self._origins else None

    def _note_origin(self, name: str, path: Path, shown: str) -> None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._origins[name] = (shown, path.stat().st_size, digest)


def _stem(file_name: str) -> str | None:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file_name.endswith(suffix):
            return file_name.removesuffix(suffix)
    return None


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=256):
            yield from batch.to_pylist()
