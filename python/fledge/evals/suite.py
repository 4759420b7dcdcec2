"""Many exams of one model: each taken once, kept, and read back when nothing has changed.

`take` examines a model on one exam of either kind; `chatcore` and `core_table` make the composite
scores. Called by `stages.evaluate` (inside a run) and by `fledge eval`. It opens no files of its
own: `Store` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fledge.dist import World
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.evals.core import aggregate, core_scores
from fledge.evals.core_exam import examine_core_task
from fledge.evals.core_prompts import Profile
from fledge.evals.examine import Sampling, TaskResult, pick_items, score_task
from fledge.evals.records import Store, digest
from fledge.evals.tasks.base import Task
from fledge.evals.tasks.core import CORE, CoreExam
from fledge.stats import Z95

CHATCORE = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
"""nanochat's five (its baselines: a quarter for the letters, 0 for the rest). Its releases differ
in their lists, so the list stands beside the number; old and new values do not compare."""
_FIXED_CHANCE: dict[str, float] = dict.fromkeys(CHATCORE[:3], 0.25)
_RESULT_KEYS = ("value", "low", "high", "n", "chance", "seconds", "note", "stderr")


@dataclass(frozen=True)
class Options:
    """How exams are taken."""

    max_examples: int | None = None
    profile: Profile = "nanochat"
    deterministic: bool = False
    sampling: Sampling = field(default_factory=Sampling)


def take(
    engine: Engine,
    task: Task | CoreExam,
    options: Options,
    *,
    store: Store | None = None,
    world: World | None = None,
    after_chunk: Callable[[int], None] | None = None,
) -> TaskResult:
    """The result of one exam, from the store if it was taken before on the same model and task.

    The ranks of a `world` share the examples and all get the result; the leader alone reads and
    writes the store. To be called by all of them.
    """
    world = world or World()
    key = store.key(task_key(task, options)) if store is not None else ""
    before = kept(task, options, store) if store is not None and world.leads else None
    before = world.tell(before)
    if before is not None:
        return before
    partial = store.partial_file(task.name) if store is not None else None
    common: dict[str, Any] = {
        "max_examples": options.max_examples,
        "partial": partial,
        "key": key,
        "world": world,
        "after_chunk": after_chunk,
    }
    if isinstance(task, CoreExam):
        result = examine_core_task(
            engine,
            task.task,
            task.rows,
            profile=options.profile,
            deterministic=options.deterministic,
            **common,
        )
    else:
        with Tools() as tools:
            result = score_task(engine, task, tools, sampling=options.sampling, **common)
    if store is not None and world.leads:
        store.write(task.name, key, result.summary(), result.records)
    return result


def kept(task: Task | CoreExam, options: Options, store: Store) -> TaskResult | None:
    """The result of an exam that the store holds, or None."""
    found = store.read(task.name, store.key(task_key(task, options)))
    return None if found is None else _read_back(task.name, *found)


def task_key(task: Task | CoreExam, options: Options) -> list[Any]:
    """What a result depends on beside the model: the questions, and how they are asked."""
    if isinstance(task, CoreExam):
        rows = task.sha256 or digest([*task.rows])
        how = [options.profile, options.deterministic]
    else:
        rows = digest(pick_items(task.items(), options.max_examples))
        sampling = options.sampling
        how = [sampling.samples, sampling.temperature, sampling.seed]
        how += [sampling.dry_multiplier] * bool(sampling.dry_multiplier)  # kept results stay valid
    return [task.name, task.kind, rows, options.max_examples, *how]


def _read_back(name: str, table: Mapping[str, Any], records: list[dict[str, Any]]) -> TaskResult:
    known = {key: table.get(key) for key in _RESULT_KEYS}
    skipped = {"task", "key", "unit", *_RESULT_KEYS}
    details = {key: value for key, value in table.items() if key not in skipped}
    return TaskResult(name=name, records=records, details=details, **known)  # type: ignore[arg-type]


def chatcore_tasks(names: Iterable[str]) -> list[str]:
    """Which of the tasks ChatCORE is taken over: nanochat's five as far as they are there, else all
    of a world's own exams."""
    known = list(names)
    real = [name for name in CHATCORE if name in known]
    return real or [name for name in known if name != "chat" and not name.startswith(CORE)]


def chatcore(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """ChatCORE of scores by task name: the mean of (accuracy - chance) / (1 - chance).

    Over nanochat's five tasks as far as they were taken, or over all tasks given where none of
    those was (a world's own exams); "tasks" lists what it covers, "missing" what it lacks.
    """
    names = chatcore_tasks(results)
    real = [name for name in names if name in CHATCORE]
    if not names:
        return None
    centred, squares = {}, []
    for name in names:
        score = results[name]
        chance = _FIXED_CHANCE.get(name)
        chance = score["chance"] if chance is None else chance
        centred[name] = (score["value"] - chance) / (1 - chance)
        error = score.get("stderr")
        squares.append((error / (1 - chance)) ** 2 if error is not None else math.nan)
    value = math.fsum(centred.values()) / len(centred)
    half = Z95 * math.sqrt(math.fsum(squares)) / len(centred)
    known = not math.isnan(half)
    table = {
        "task": "chatcore",
        "value": value,
        "low": value - half if known else None,
        "high": value + half if known else None,
        "n": sum(results[name]["n"] for name in names),
        "chance": 0.0,
        "unit": "centred accuracy",
        "tasks": centred,
        "missing": [name for name in CHATCORE if real and name not in results],
    }
    if table["missing"]:
        table["note"] = f"mean of {len(real)} of {len(CHATCORE)} tasks; missing: " + ", ".join(
            table["missing"]
        )
    return table


def core_table(results: Sequence[TaskResult], *, profile: Profile) -> dict[str, Any] | None:
    """core.json of the CORE results among `results`: both versions, every task, what is missing."""
    found = {
        result.name.removeprefix(CORE + "/"): result
        for result in results
        if result.name.startswith(CORE + "/")
    }
    if not found:
        return None
    table = aggregate(
        {name: result.value for name, result in found.items()},
        {name: _error(result) for name, result in found.items()},
    )
    tasks = {name: result.summary() for name, result in found.items()}
    truncated = sum(task["truncated"] for task in tasks.values())
    n = sum(result.n for result in found.values())
    return {
        "task": CORE,
        "profile": profile,
        **table,
        "n": n,
        "truncated": truncated,
        "scores": core_scores(table, n),
        "tasks": tasks,
    }


def _error(result: TaskResult) -> float:
    """Standard error of a result; of a single example 0.5, the most that it can be."""
    return 0.5 if result.stderr is None or math.isnan(result.stderr) else result.stderr
