"""The run directory: every path in it, who holds it, what is done, and what may be continued.

`Run.open` creates or reopens a run (DESIGN 4.3) and holds its lock; `Run.read` looks at one without
holding it (chat, report). A stage is fingerprinted by its numeric keys, the fingerprints of the
stages it builds on, and its data; re-running skips what is done, resumes what is partial and
refuses, naming the keys, what differs. What was decided (resolved.json) is `fledge.resolved`'s
business. Called by stages, chat and report. It never trains, never imports torch, and is the only
module that builds a path inside a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fledge import files, resolved
from fledge.config import (
    LATER_KEYS,
    NUMERIC_KEYS,
    STAGES,
    TRAINED_STAGES,
    ModelConfig,
    Recipe,
    recipe_from_dict,
    recipe_to_toml,
)
from fledge.errors import UserError
from fledge.fingerprint import changed_keys, fingerprint
from fledge.resolved import PlanLike

READS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tokenizer": (("data", "tokenizer"), ()),
    "base": (("data", "model", "base"), ("tokenizer",)),
    "mid": (("mid",), ("base",)),
    "sft": (("sft",), ("mid",)),
    "rl": (("rl",), ("sft",)),
    "evaluate": (("evaluate",), TRAINED_STAGES),
}
"""(sections, stages) that a stage reads itself; what those read comes in by their fingerprints."""

_RECORD_KEYS = {"status": str, "fingerprint": str, "inputs": dict, "parts": dict} | dict.fromkeys(
    ("seconds", "peak_memory_bytes", "attempts"), (int, float)
)


class Run:
    """One run directory, held (Run.open) or only looked at (Run.read).

    `asked` is the recipe as the user gave it, `recipe` the same with every planned value filled in,
    `model` the network's shape, `resolved` the content of resolved.json.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.resolved = content
        self._lock: int | None = None
        self._fresh = content  # as this version's planner resolves what was asked
        self._pending = False  # resolved differs from what the folder holds

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        out: Path,
        name: str,
        recipe: Recipe,
        plan: PlanLike,
        *,
        origin: Mapping[str, Any] | None = None,
    ) -> Run:
        """Create or reopen the run at `out` and hold its lock until `close` or exit.

        A run that exists keeps its resolved.json; when `recipe` asks for something else than the
        stored one, the new numbers apply to stages that have not begun, and `stage_state` refuses
        where they would change a stage that has. Numbers of the execution (threads, rows per
        device) always come from the new plan. `origin`: how it was asked for (resolved.json keeps
        it). Raises UserError if the folder cannot be written, is
        something else than a run, or is held by another process; nothing new stays behind then.
        """
        out = Path(out).absolute()
        fresh = resolved.describe(name, recipe, plan, origin or {})
        with contextlib.ExitStack() as undo:
            with files.refusals(out):
                for folder in [p for p in (out, *out.parents) if not p.exists()][::-1]:
                    folder.mkdir(exist_ok=True)
                    undo.callback(_remove_quietly, folder)
                before = os.listdir(out)
            lock = files.take_lock(out / ".lock", out)
            undo.callback(os.close, lock)
            for new in {".lock", "recipe.toml", "resolved.json"}.difference(before):
                undo.callback(_remove_quietly, out / new)
            run = cls._create_or_reopen(out, fresh, plan)
            undo.pop_all()
        run._fresh = fresh
        run._lock = lock
        return run

    @classmethod
    def _create_or_reopen(cls, out: Path, fresh: dict[str, Any], plan: PlanLike) -> Run:
        if not cls.is_run(out):
            # a folder that is not ours stays as it is: one may have said --out . by mistake
            own = (".lock", "resolved.json" + files.TEMPORARY)
            foreign = sorted(name for name in os.listdir(out) if name not in own)
            if foreign:
                raise UserError(
                    f"{out} is not empty and not a run directory",
                    f"it holds {', '.join(foreign[:3])}" + (" ..." if len(foreign) > 3 else ""),
                    "give a new or empty folder with --out DIR",
                )
            run = cls(out, fresh)
            run._write_description()
            return run
        with files.refusals(out):
            files.remove_temporary(out)
        run = cls.read(out)
        text = recipe_to_toml(run.asked).encode()
        if not run.recipe_file.is_file() or run.recipe_file.read_bytes() != text:
            run._write_description()  # killed while it was written
        run.resolved, run._pending = resolved.join(
            run.resolved, fresh, plan, where=run.resolved_file
        )
        return run

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
        return cls(path, resolved.read(path / "resolved.json"))

    @staticmethod
    def is_run(path: Path) -> bool:
        """True if `path` is a run directory."""
        return (Path(path) / "resolved.json").is_file()

    def is_worked_on(self) -> bool:
        """Whether the process that last held the run still lives; does not touch the lock.

        Taking the lock to find out would make a `fledge run` that starts just then fail.
        """
        if os.name == "nt":
            return True  # os.kill would end the process there; a stage's record must do
        try:
            pid = int((self.path / ".lock").read_text(encoding="utf-8", errors="replace"))
            os.kill(pid, 0)
        except PermissionError:
            return True  # another user's process
        except (OSError, ValueError, OverflowError):
            return False
        return True

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
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
        return resolved.asked(self.resolved, where=self.resolved_file)

    @property
    def recipe(self) -> Recipe:
        """The recipe with every planned value filled in."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            section, _, name = key.partition(".")
            if value is not None:
                tables.setdefault(section, {})[name] = value
        return recipe_from_dict(tables, where=str(self.resolved_file))

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

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer."""
        return self.path / "tokenizer"

    def evaluate_dir(self, stage: str | None = None) -> Path:
        """Folder of the exams, of one stage's model if given."""
        return self.path / "evaluate" / stage if stage else self.path / "evaluate"

    @property
    def overlap_file(self) -> Path:
        """Which exam questions stand in the training text (`fledge data overlap`)."""
        return self.evaluate_dir() / "overlap.json"

    def step_evals_dir(self, stage: str, checkpoint: str) -> Path:
        """Folder of the exams of one checkpoint that `fledge eval` took."""
        return self.stage_dir(stage) / "evals" / checkpoint

    def task_file(self, stage: str, task: str) -> Path:
        """Result of one exam."""
        return self.evaluate_dir(stage) / f"{task}.json"

    def task_samples_file(self, stage: str, task: str) -> Path:
        """Transcripts of one exam."""
        return self.evaluate_dir(stage) / f"{task}.samples.jsonl"

    def chat_file(self, stage: str) -> Path:
        """How good the chat of a stage's model is."""
        return self.evaluate_dir(stage) / "chat" / "quality.json"

    def chat_samples_file(self, stage: str) -> Path:
        """The dialogues of that look."""
        return self.evaluate_dir(stage) / "chat" / "dialogues.jsonl"

    def report_file(self, suffix: Literal["md", "html", "json"]) -> Path:
        """The report in one of its forms."""
        return self.path / f"report.{suffix}"

    def plot_file(self, name: str) -> Path:
        """One plot."""
        return self.path / "plots" / f"{name}.svg"

    @property
    def needs_file(self) -> Path:
        """Of a rehearsal: what the whole run will need."""
        return self.path / "needs.json"

    @property
    def tokenizer_stats_file(self) -> Path:
        """What the tokenizer was trained on and how well it compresses."""
        return self.tokenizer_dir / "stats.json"

    @property
    def entropy_file(self) -> Path:
        """The entropy of a world's own text, below which no model's bpb can fall."""
        return self.stage_dir("base") / "entropy.json"

    @property
    def corpus_file(self) -> Path:
        """What base reads: the name of the text, how much there is, how often it was read."""
        return self.stage_dir("base") / "corpus.json"

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
        latest = self.stage_dir(stage) / "LATEST"
        if not latest.is_file():
            return None
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        folder = self.checkpoints_dir(stage) / name
        if not (re.fullmatch(r"step_\d+", name) and folder.is_dir()):
            raise UserError(
                f"{self.stage_dir(stage)} names {name!r} as its last checkpoint",
                "that folder is missing",
                f"restore it, or train the stage anew with --restart {stage}",
            )
        return folder

    def last_model(self) -> tuple[str, Path] | None:
        """(stage, checkpoint) of the furthest stage that has one."""
        for stage in reversed(TRAINED_STAGES):
            folder = self.latest_checkpoint(stage)
            if folder is not None:
                return stage, folder
        return None

    # -- stages ----------------------------------------------------------------------------------

    def read_stage(self, stage: str) -> dict[str, Any] | None:
        """The stage's record (stage.json), or None before it begins."""
        path = self.stage_file(stage)
        if not path.is_file():
            return None
        fix = f"restore it, or do the stage anew with --restart {stage}"
        return files.read_json(path, _RECORD_KEYS, fix=fix)

    def stage_parts(self, stage: str, *, data: Any) -> dict[str, Any]:
        """Everything the stage's result depends on; what its fingerprint is taken over.

        data: the manifest of what it reads (JSON-able, no times).
        """
        sections, inputs = READS[stage]
        records = {name: self.read_stage(name) for name in inputs}
        parts = {
            "format": resolved.FORMAT,
            "values": {
                key: value
                for key, value in self.values.items()
                if key in NUMERIC_KEYS
                and key.partition(".")[0] in sections
                and not (key in LATER_KEYS and value in (LATER_KEYS[key], _plain(LATER_KEYS[key])))
            },
            "inputs": {n: r["fingerprint"] for n, r in records.items() if r is not None},
            "data": data,
            "extra": {},  # nothing yet; a part of format 1
        }
        return json.loads(files.canonical_json(parts))

    def stage_state(
        self, stage: str, parts: Mapping[str, Any]
    ) -> Literal["skip", "resume", "start"]:
        """What to do with a stage: "skip" (done), "resume" (begun) or "start".

        Raises UserError naming every changed key when the stage was begun with other parts.
        """
        record = self.read_stage(stage)
        if record is None:
            return "start"
        if record["fingerprint"] != fingerprint(parts):
            raise _refusal(self, stage, record, parts)
        return "skip" if record["status"] == "done" else "resume"

    def begin_stage(self, stage: str, parts: Mapping[str, Any]) -> None:
        """Record that the stage runs now."""
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
        files.write_json(self.stage_file(stage), record)

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
        kept = {section for s in STAGES if s not in later for section in READS[s][0]}
        self.resolved = resolved.prefer(
            self.resolved,
            self._fresh,
            lambda key: key.partition(".")[0] in kept,
            model="model" in kept,
        )
        self._pending = True
        for name in reversed(gone):
            files.remove_whole(self.stage_dir(name))
        self._write_description()
        return gone

    def _write_description(self) -> None:
        """resolved.json, whose presence makes the folder a run, and recipe.toml."""
        files.write_json(self.resolved_file, self.resolved)
        files.write_text(self.recipe_file, recipe_to_toml(self.asked))
        self._pending = False


def _plain(value: Any) -> Any:
    """As JSON has it: a tuple is a list there."""
    return list(value) if isinstance(value, tuple) else value


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
    if path.name in STAGES and Run.is_run(path.parent):
        run = Run.read(path.parent)
        folder = run.latest_checkpoint(path.name)
        if folder is not None:
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


def _remove_quietly(path: Path) -> None:
    """Delete a file or an empty folder if that can be done."""
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()
