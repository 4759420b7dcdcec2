"""The run directory: every path in it, who holds it, what is done, and what may be continued.

`Run.open` creates or reopens a run (DESIGN 4.3) and holds its lock; `Run.read` looks at one without
holding it (chat, report). A stage is fingerprinted by its numeric keys, the fingerprints of the
stages it builds on, and its data; re-running skips what is done, resumes what is partial and
refuses, naming the keys, what differs. Called by stages, chat and report. It never trains, never
imports torch, and is the only module that builds a path inside a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from fledge import files
from fledge.config import (
    STAGES,
    ModelConfig,
    Recipe,
    recipe_from_dict,
    recipe_to_dict,
    recipe_to_toml,
)
from fledge.errors import UserError
from fledge.files import (
    atomic_directory,
    require_free_bytes,
    write_bytes,
    write_json,
    write_text,
)
from fledge.fingerprint import (
    changed_keys,
    environment,
    fingerprint,
    is_execution_key,
)
from fledge.runlog import (
    TIMING_KEYS,
    MetricsLog,
    StopRequest,
    read_metrics,
    without_timing,
)

# callers above run take the writers and the log from here
__all__ = [
    "FORMAT",
    "STAGE_INPUTS",
    "STAGE_SECTIONS",
    "TIMING_KEYS",
    "MetricsLog",
    "Run",
    "StopRequest",
    "atomic_directory",
    "describe",
    "find_checkpoint",
    "read_metrics",
    "require_free_bytes",
    "without_timing",
    "write_bytes",
    "write_json",
    "write_text",
]

FORMAT = 1
"""Version of the run directory; a change makes older runs refuse instead of misread."""

STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("data", "tokenizer"),
    "base": ("data", "model", "base"),
    "mid": ("mid",),
    "sft": ("sft",),
    "rl": ("rl",),
    "evaluate": ("evaluate",),
}
"""Whose keys a stage reads itself; what its inputs read comes in by their fingerprints."""

STAGE_INPUTS: dict[str, tuple[str, ...]] = {
    "tokenizer": (),
    "base": ("tokenizer",),
    "mid": ("base",),
    "sft": ("mid",),
    "rl": ("sft",),
    "evaluate": ("base", "mid", "sft", "rl"),
}

_PLACES = frozenset({"data.source", "data.root"})
"""Keys that say where the data lies; the manifest says what it is, so a folder may move."""

State = Literal["skip", "resume", "start"]


class PlanLike(Protocol):
    """What a run needs of a `fledge.plan.planner.Plan` (run may not import plan)."""

    def to_dict(self) -> dict[str, Any]: ...

    def replan(self, recipe: Recipe) -> PlanLike: ...


class Run:
    """One run directory, held (Run.open) or only looked at (Run.read).

    `asked` is the recipe as the user gave it, `recipe` the same with every planned value filled in,
    `model` the network's shape, `resolved` the content of resolved.json.
    """

    def __init__(self, path: Path, resolved: dict[str, Any]) -> None:
        self.path = path
        self.resolved = resolved
        self._lock: int | None = None
        self._fresh: dict[str, Any] = resolved
        self._pending = False

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, out: Path, name: str, recipe: Recipe, plan: PlanLike) -> Run:
        """Create or reopen the run at `out` and hold its lock until `close` or exit.

        A run that exists keeps its resolved.json; when `recipe` asks for something else than the
        stored one, the new numbers apply to stages that have not begun, and `stage_state` refuses
        where they would change a stage that has. Numbers of the execution (threads, rows per
        device) always come from the new plan. Raises UserError if the folder cannot be written, is
        something else than a run, or is held by another process.
        """
        out = Path(out).absolute()
        fresh = describe(name, recipe, plan)
        made = _make_folder(out)
        before = {p.name for p in out.iterdir()}
        lock = files.take_lock(out / ".lock", out)
        try:
            run = cls._create_or_reopen(out, fresh, plan)
        except BaseException:
            with contextlib.suppress(OSError):
                for name in {".lock", "recipe.toml", "resolved.json"} - before:
                    (out / name).unlink(missing_ok=True)
            os.close(lock)
            _remove_if_empty(made)
            raise
        run._fresh = fresh
        run._lock = lock
        return run

    @classmethod
    def _create_or_reopen(cls, out: Path, fresh: dict[str, Any], plan: PlanLike) -> Run:
        resolved_file = out / "resolved.json"
        if not resolved_file.exists():
            # a folder that is not ours stays as it is: one may have said --out . by mistake
            own = (".lock", "resolved.json" + files.TEMPORARY)
            foreign = [p.name for p in out.iterdir() if p.name not in own]
            if foreign:
                raise UserError(
                    f"{out} is not empty and not a run directory",
                    f"it holds {', '.join(sorted(foreign)[:3])}"
                    + (" ..." if len(foreign) > 3 else ""),
                    "give a new or empty folder with --out DIR",
                )
            run = cls(out, fresh)
            run._write_description()
            return run
        with files.refusals(out):
            files.remove_temporary(out)
        run = cls(out, _read_resolved(resolved_file))
        if not run._recipe_is_written():  # killed while the description was written
            run._write_description()
        run._take_up(fresh, plan)
        return run

    def _take_up(self, fresh: dict[str, Any], plan: PlanLike) -> None:
        """Merge a new plan into the stored one: what the change of the recipe moves is new, all
        else stays as it was resolved, even where this version's planner would choose otherwise."""
        stored = self.resolved
        before = plan.replan(self.asked).to_dict()  # the old recipe by this version's planner
        values = {
            key: value
            if is_execution_key(key) or key in _PLACES or value != before["values"].get(key)
            else stored["values"].get(key, value)
            for key, value in fresh["values"].items()
        }
        same_model = fresh["model"] == before["model"]
        if _numeric_recipe(fresh["recipe"]) != _numeric_recipe(stored["recipe"]):
            self._pending = True
            model = stored["model"] if same_model else fresh["model"]
            self.resolved = fresh | {"values": values, "model": model}
            return
        stored["values"] = values
        for place in _PLACES:
            section, key = place.split(".")
            stored["recipe"][section].pop(key, None)
            if key in fresh["recipe"][section]:
                stored["recipe"][section][key] = fresh["recipe"][section][key]

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run at `path` without its lock: for chat and report, also while it trains."""
        path = Path(path).absolute()
        if not cls.is_run(path):
            raise UserError(
                f"{path} is not a run directory",
                "it holds no resolved.json" if path.is_dir() else "there is no such folder",
                "give the folder that `fledge run` wrote, for example runs/quickstart",
            )
        return cls(path, _read_resolved(path / "resolved.json"))

    @staticmethod
    def is_run(path: Path) -> bool:
        """True if `path` is a run directory."""
        return (Path(path) / "resolved.json").is_file()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what was decided ------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.resolved["name"]

    @property
    def values(self) -> dict[str, Any]:
        """Every key as "section.key" -> value, the planned ones filled in."""
        return self.resolved["values"]

    @property
    def asked(self) -> Recipe:
        """The recipe as the user gave it."""
        return recipe_from_dict(self.resolved["recipe"], where=str(self.path / "resolved.json"))

    @property
    def recipe(self) -> Recipe:
        """The recipe with every planned value filled in."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            section, _, name = key.partition(".")
            if value is not None:
                tables.setdefault(section, {})[name] = value
        return recipe_from_dict(tables, where=str(self.path / "resolved.json"))

    @property
    def model(self) -> ModelConfig:
        """The network's shape."""
        return ModelConfig(**self.resolved["model"])

    # -- paths -----------------------------------------------------------------------------------

    def stage_dir(self, stage: str) -> Path:
        """Folder of one stage."""
        assert stage in STAGES, stage
        return self.path / stage

    def stage_file(self, stage: str) -> Path:
        """Its record: status, fingerprint, times."""
        return self.stage_dir(stage) / "stage.json"

    def metrics_file(self, stage: str) -> Path:
        """One JSON object per logging event."""
        return self.stage_dir(stage) / "metrics.jsonl"

    def log_file(self, stage: str) -> Path:
        """The plain lines that the terminal showed."""
        return self.stage_dir(stage) / "log.txt"

    def samples_file(self, stage: str) -> Path:
        """What the model of this stage writes, for people."""
        return self.stage_dir(stage) / "samples.md"

    def checkpoints_dir(self, stage: str) -> Path:
        """Folder of the stage's checkpoints."""
        return self.stage_dir(stage) / "checkpoints"

    def checkpoint_dir(self, stage: str, step: int) -> Path:
        """Folder of one checkpoint: the Hugging Face files and train_state/."""
        return self.checkpoints_dir(stage) / f"step_{step:06d}"

    def evals_dir(self, stage: str, step: int) -> Path:
        """Folder of what was measured on one checkpoint while training."""
        return self.stage_dir(stage) / "evals" / f"step_{step:06d}"

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer."""
        return self.path / "tokenizer"

    def evaluate_dir(self, stage: str | None = None) -> Path:
        """Folder of the exams, of one stage's model if given."""
        return self.path / "evaluate" / stage if stage else self.path / "evaluate"

    def task_file(self, stage: str, task: str) -> Path:
        """Result of one exam."""
        return self.evaluate_dir(stage) / f"{task}.json"

    def task_samples_file(self, stage: str, task: str) -> Path:
        """Transcripts of one exam."""
        return self.evaluate_dir(stage) / f"{task}.samples.jsonl"

    def report_file(self, suffix: Literal["md", "html", "json"]) -> Path:
        """The report in one of its forms."""
        return self.path / f"report.{suffix}"

    def plot_file(self, name: str) -> Path:
        """One plot."""
        return self.path / "plots" / f"{name}.svg"

    @property
    def tokenizer_stats_file(self) -> Path:
        """What the tokenizer was trained on and how well it compresses."""
        return self.tokenizer_dir / "stats.json"

    @property
    def entropy_file(self) -> Path:
        """The entropy of a world's own text, below which no model's bpb can fall."""
        return self.stage_dir("base") / "entropy.json"

    def mixture_file(self, stage: str) -> Path:
        """Shares of the kinds of conversations that a stage was trained on."""
        return self.stage_dir(stage) / "mixture.json"

    @property
    def recipe_file(self) -> Path:
        """What was asked."""
        return self.path / "recipe.toml"

    @property
    def resolved_file(self) -> Path:
        """What was decided."""
        return self.path / "resolved.json"

    # -- checkpoints -----------------------------------------------------------------------------

    def set_latest(self, stage: str, step: int) -> None:
        """Point LATEST at a checkpoint that is whole; the last act of saving."""
        folder = self.checkpoint_dir(stage, step)
        assert folder.is_dir(), folder
        files.write_text(self.stage_dir(stage) / "LATEST", folder.name + "\n")

    def latest_checkpoint(self, stage: str) -> Path | None:
        """The checkpoint that LATEST names, or None if the stage has none."""
        try:
            name = (self.stage_dir(stage) / "LATEST").read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError:
            name = ""
        folder = self.checkpoints_dir(stage) / name
        if not (name.startswith("step_") and name[5:].isdigit() and folder.is_dir()):
            raise UserError(
                f"{self.stage_dir(stage)} names {name!r} as its last checkpoint",
                "that folder is missing",
                f"restore it, or train the stage anew with --restart {stage}",
            )
        return folder

    def last_model(self) -> tuple[str, Path] | None:
        """(stage, checkpoint) of the furthest stage that has one."""
        for stage in ("rl", "sft", "mid", "base"):
            folder = self.latest_checkpoint(stage)
            if folder is not None:
                return stage, folder
        return None

    # -- stages ----------------------------------------------------------------------------------

    def read_stage(self, stage: str) -> dict[str, Any] | None:
        """The stage's record (stage.json), or None before it begins."""
        try:
            record = json.loads(self.stage_file(stage).read_text(encoding="utf-8"))
            _require_keys(record, _RECORD_KEYS)
            return record
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise UserError(
                f"{self.stage_file(stage)} is damaged",
                str(error),
                f"restore it, or do the stage anew with --restart {stage}",
            ) from None

    def stage_parts(
        self,
        stage: str,
        *,
        data: Any = None,
        inputs: Iterable[str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Everything the stage's result depends on; what its fingerprint is taken over.

        data: the manifest of what it reads (JSON-able, no times). inputs: the stages it builds on;
        by default those of STAGE_INPUTS that have been done. extra: more that counts, by name.
        """
        names = STAGE_INPUTS[stage] if inputs is None else tuple(inputs)
        records = {name: self.read_stage(name) for name in names}
        parts = {
            "format": FORMAT,
            "values": self._numeric_values(stage),
            "inputs": {n: r["fingerprint"] for n, r in records.items() if r is not None},
            "data": data,
            "extra": dict(extra or {}),
        }
        return json.loads(files.canonical_json(parts))

    def _numeric_values(self, stage: str) -> dict[str, Any]:
        sections = STAGE_SECTIONS[stage]
        return {
            key: value
            for key, value in self.values.items()
            if key.partition(".")[0] in sections
            and not is_execution_key(key)
            and key not in _PLACES
        }

    def stage_state(self, stage: str, parts: Mapping[str, Any]) -> State:
        """What to do with a stage: "skip" (done), "resume" (begun) or "start".

        Raises UserError naming every changed key when the stage was begun with other parts.
        """
        record = self.read_stage(stage)
        if record is None:
            return "start"
        if record["fingerprint"] != fingerprint(parts):
            raise _refusal(self, stage, record, parts)
        return "skip" if record["status"] == "done" else "resume"

    def begin_stage(self, stage: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Record that the stage runs now; returns the record."""
        if self._pending:
            self._write_description()
        old = self.read_stage(stage) or {}
        record = {
            "status": "running",
            "fingerprint": fingerprint(parts),
            "inputs": parts["inputs"],
            "started": old.get("started", time.time()),
            "finished": None,
            "attempts": old.get("attempts", 0) + 1,
            "seconds": old.get("seconds", 0.0),
            "peak_memory_bytes": old.get("peak_memory_bytes", 0),
            "parts": dict(parts),
        }
        with files.refusals(self.stage_dir(stage)):
            self.stage_dir(stage).mkdir(parents=True, exist_ok=True)
        files.write_json(self.stage_file(stage), record)
        return record

    def end_stage(
        self,
        stage: str,
        status: Literal["done", "interrupted", "failed"],
        *,
        seconds: float,
        peak_memory_bytes: int = 0,
        **facts: Any,
    ) -> None:
        """Record how the stage ended. `seconds` of this attempt are added to those before."""
        record = self.read_stage(stage)
        assert record is not None, stage
        record["status"] = status
        record["finished"] = time.time()
        record["seconds"] = round(record["seconds"] + seconds, 3)
        record["peak_memory_bytes"] = max(record["peak_memory_bytes"], peak_memory_bytes)
        record |= facts
        files.write_json(self.stage_file(stage), record)

    def restart(self, stage: str) -> list[str]:
        """Throw away a stage and all later ones, and plan them anew; returns their names.

        Each folder is first moved aside in one step, so a crash leaves it whole or gone. Earlier
        stages keep their numbers.
        """
        assert self._lock is not None, "only a held run may be changed"
        later = STAGES[STAGES.index(stage) :]
        gone = [s for s in later if self.stage_dir(s).exists()]
        kept = {section for s in STAGES if s not in later for section in STAGE_SECTIONS[s]}
        values = {
            key: self.values.get(key, value) if key.partition(".")[0] in kept else value
            for key, value in self._fresh["values"].items()
        }
        model = self.resolved["model"] if "model" in kept else self._fresh["model"]
        self.resolved = self._fresh | {"values": values, "model": model}
        self._pending = True
        with files.refusals(self.path):
            for name in reversed(gone):
                aside = self.path / f"{name}.gone{files.TEMPORARY}"
                files.remove(aside)
                os.rename(self.stage_dir(name), aside)
                files.remove(aside)
        self._write_description()
        return gone

    def _recipe_is_written(self) -> bool:
        try:
            return self.recipe_file.read_text(encoding="utf-8") == recipe_to_toml(self.asked)
        except (FileNotFoundError, UnicodeDecodeError):
            return False

    def _write_description(self) -> None:
        """resolved.json, whose presence makes the folder a run, and recipe.toml."""
        files.write_json(self.resolved_file, self.resolved)
        files.write_text(self.recipe_file, recipe_to_toml(self.asked))
        self._pending = False


def find_checkpoint(path: Path) -> tuple[Path, Run | None, str | None]:
    """(checkpoint folder, its run, its stage) of a run directory, a stage or a checkpoint.

    A run gives its last model; a checkpoint that lies in no run has neither run nor stage.
    """
    path = Path(path).absolute()
    if Run.is_run(path):
        run = Run.read(path)
        last = run.last_model()
        if last is None:
            raise UserError(
                f"{path} has no trained model yet",
                "no stage has saved a checkpoint",
                "go on with `fledge run`; there is one as soon as base has begun to save",
            )
        return last[1], run, last[0]
    if (path / "LATEST").is_file() and path.name in STAGES and Run.is_run(path.parent):
        run = Run.read(path.parent)
        folder = run.latest_checkpoint(path.name)
        assert folder is not None
        return folder, run, path.name
    if (path / "config.json").is_file():
        stage = path.parent.parent
        if path.parent.name == "checkpoints" and stage.name in STAGES and Run.is_run(stage.parent):
            return path, Run.read(stage.parent), stage.name
        return path, None, None
    raise UserError(
        f"{path} holds no model",
        "it is neither a run directory nor a checkpoint folder with a config.json",
        "give what `fledge run` wrote, for example runs/quickstart",
    )


def describe(name: str, recipe: Recipe, plan: PlanLike) -> dict[str, Any]:
    """The content of resolved.json: the plan, the recipe and where it was made."""
    return {
        "format": FORMAT,
        "name": name,
        "recipe": recipe_to_dict(recipe),
        **plan.to_dict(),
        **environment(),
        "created": time.time(),
    }


def _read_resolved(path: Path) -> dict[str, Any]:
    try:
        resolved = json.loads(path.read_text(encoding="utf-8"))
        _require_keys(resolved, {"format": int})
        found = resolved["format"]
        if found == FORMAT:
            _require_keys(resolved, _RESOLVED_KEYS)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged", str(error), "restore it, or start anew with --out DIR"
        ) from None
    if found != FORMAT:
        raise UserError(
            f"{path.parent} was written by another version of fledge",
            f"its format is {found}, this version writes {FORMAT}",
            f"use fledge {resolved.get('versions', {}).get('fledge', '')} for it, or another --out",
        )
    return resolved


_RESOLVED_KEYS = {"name": str} | dict.fromkeys(
    ("recipe", "model", "values", "rules", "estimates", "hardware", "versions"), dict
)
_RECORD_KEYS = {"status": str, "fingerprint": str, "inputs": dict, "parts": dict} | dict.fromkeys(
    ("seconds", "peak_memory_bytes", "attempts"), (int, float)
)


def _require_keys(table: Any, keys: Mapping[str, Any]) -> None:
    """ValueError that names what a stored JSON object lacks."""
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__} instead of an object")
    for key, kind in keys.items():
        if not isinstance(table.get(key), kind):
            raise ValueError(f"its entry {key!r} is missing or of a wrong kind")


def _numeric_recipe(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    flat = {f"{s}.{k}": v for s, table in tables.items() for k, v in table.items()}
    return {k: v for k, v in flat.items() if not is_execution_key(k) and k not in _PLACES}


def _refusal(
    run: Run, stage: str, record: Mapping[str, Any], parts: Mapping[str, Any]
) -> UserError:
    # what the user set comes first, what follows from it after
    rules = run.resolved["rules"]
    lines = sorted(
        changed_keys(record["parts"], parts),
        key=lambda line: "given" not in rules.get(line.partition(":")[0], "given"),
    )
    shown = "; ".join(lines[:12]) + (f"; and {len(lines) - 12} more" if len(lines) > 12 else "")
    state = "finished" if record["status"] == "done" else "begun"
    return UserError(
        f"{run.path} cannot go on: its stage {stage} was {state} with other settings",
        f"changed since then: {shown}",
        "restore the old value, give another --out DIR, "
        f"or throw that stage and the later ones away with --restart {stage}",
    )


def _make_folder(out: Path) -> list[Path]:
    """Make the run's folder; returns the folders that were not there before, outermost first."""
    made: list[Path] = []
    with files.refusals(out):
        missing = [p for p in (out, *out.parents) if not p.exists()][::-1]
        try:
            for folder in missing:
                folder.mkdir(exist_ok=True)
                made.append(folder)
            if not out.is_dir():
                raise NotADirectoryError(20, "Not a directory", str(out))
        except OSError:
            _remove_if_empty(made)
            raise
    return made


def _remove_if_empty(made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in reversed(made):
            folder.rmdir()
