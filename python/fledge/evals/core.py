"""CORE: the mean over 22 tasks of centred accuracy, exactly as DCLM and nanochat compute it.

What each task is (`CORE_TASKS`), how accuracies become one number (`aggregate`), and the exam of a
model on them (`run_core`). CORE exists in two versions that differ in three baselines and by about
0.023, so both always stand side by side. Sources: DCLM (arXiv 2406.11794; mlfoundations/dclm
361714b, eval/eval_meta_data.csv and its version before 2025-09-05) and nanochat 92d63d4, which
keeps v1. Called by `evals.suite`. It renders no prompt (`core_prompts`) and runs no model itself
(`scoring`); a task that is not there is named and makes the mean None, never silently smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fledge.data.task_files import TaskData, require_rows
from fledge.stats import Z95

Kind = Literal["multiple_choice", "schema", "language_modeling"]
VERSIONS = ("v1", "v2")


@dataclass(frozen=True)
class CoreTask:
    """One of the 22. Baselines in percent: what centring takes for guessing."""

    name: str
    file: str
    kind: Kind
    shots: int
    baseline_v1: float
    baseline_v2: float
    delimiter: str = " "

    def centred(self, accuracy: float, version: str) -> float:
        """(accuracy - baseline) / (1 - baseline)."""
        baseline = 0.01 * (self.baseline_v1 if version == "v1" else self.baseline_v2)
        return (accuracy - baseline) / (1.0 - baseline)


def _task(
    name: str, file: str, kind: Kind, shots: int, baseline: float, *, v2: float | None = None
) -> CoreTask:
    answered = ("jeopardy", "arc_easy", "arc_challenge", "piqa", "boolq")
    delimiter = "\nAnswer: " if name in answered else " "
    return CoreTask(name, file, kind, shots, baseline, baseline if v2 is None else v2, delimiter)


_MC: Kind = "multiple_choice"
_LM: Kind = "language_modeling"
_COMMON, _LANGUAGE = "commonsense_reasoning", "language_understanding"
_READING, _SYMBOLS, _WORLD = "reading_comprehension", "symbolic_problem_solving", "world_knowledge"

CORE_TASKS: tuple[CoreTask, ...] = (
    _task("hellaswag_zeroshot", f"{_LANGUAGE}/hellaswag", _MC, 0, 25.0),
    _task("jeopardy", f"{_WORLD}/jeopardy_all", _LM, 10, 0.0),
    _task("bigbench_qa_wikidata", f"{_WORLD}/bigbench_qa_wikidata", _LM, 10, 0.0),
    _task("arc_easy", f"{_WORLD}/arc_easy", _MC, 10, 25.0),
    _task("arc_challenge", f"{_WORLD}/arc_challenge", _MC, 10, 25.0),
    _task("copa", f"{_COMMON}/copa", _MC, 0, 50.0),
    _task("commonsense_qa", f"{_COMMON}/commonsense_qa", _MC, 10, 20.0, v2=40.3),
    _task("piqa", f"{_COMMON}/piqa", _MC, 10, 50.0),
    _task("openbook_qa", f"{_COMMON}/openbook_qa", _MC, 0, 25.0),
    _task("lambada_openai", f"{_LANGUAGE}/lambada_openai", _LM, 0, 0.0),
    _task("hellaswag", f"{_LANGUAGE}/hellaswag", _MC, 10, 25.0),
    _task("winograd", f"{_LANGUAGE}/winograd_wsc", "schema", 0, 50.0),
    _task("winogrande", f"{_LANGUAGE}/winogrande", "schema", 0, 50.0),
    _task("bigbench_dyck_languages", f"{_SYMBOLS}/bigbench_dyck_languages", _LM, 10, 0.0),
    _task("agi_eval_lsat_ar", f"{_SYMBOLS}/agi_eval_lsat_ar", _MC, 3, 20.0, v2=25.0),
    _task("bigbench_cs_algorithms", f"{_SYMBOLS}/bigbench_cs_algorithms", _LM, 10, 0.0),
    _task("bigbench_operators", f"{_SYMBOLS}/bigbench_operators", _LM, 10, 0.0),
    _task("bigbench_repeat_copy_logic", f"{_SYMBOLS}/bigbench_repeat_copy_logic", _LM, 10, 0.0),
    _task("squad", f"{_READING}/squad", _LM, 10, 0.0),
    _task("coqa", f"{_READING}/coqa", _LM, 0, 0.0),
    _task("boolq", f"{_READING}/boolq", _MC, 10, 62.0),
    _task(
        "bigbench_language_identification",
        f"{_LANGUAGE}/bigbench_language_identification",
        _MC,
        10,
        9.1,
        v2=25.0,
    ),
)
BY_NAME = {task.name: task for task in CORE_TASKS}

_FIELDS: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def aggregate(
    accuracy_by_task: Mapping[str, float], stderr_by_task: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """CORE of accuracies (0 to 1) by task name; names outside the 22 are ignored.

    "core_v1" and "core_v2" are the means over all 22, or None while any of them is missing;
    "missing" names those, and "present_v1"/"present_v2" are the means of what is there. With
    standard errors of the accuracies, "stderr_v1"/"stderr_v2" are those of the means: the noise of
    the examples alone, not that of another training run (about 0.006, nanochat PR #807).
    """
    present = [task for task in CORE_TASKS if task.name in accuracy_by_task]
    missing = [task.name for task in CORE_TASKS if task.name not in accuracy_by_task]
    result: dict[str, Any] = {"missing": missing}
    for version in VERSIONS:
        centred = {t.name: t.centred(accuracy_by_task[t.name], version) for t in present}
        mean = math.fsum(centred.values()) / len(centred) if centred else None
        result[f"centred_{version}"] = centred
        result[f"present_{version}"] = mean
        result[f"core_{version}"] = None if missing else mean
        if stderr_by_task is not None and present:
            slopes = {t.name: t.centred(1.0, version) - t.centred(0.0, version) for t in present}
            squares = [(slopes[t.name] * stderr_by_task[t.name]) ** 2 for t in present]
            result[f"stderr_{version}"] = math.sqrt(math.fsum(squares)) / len(present)
    return result


def core_scores(table: Mapping[str, Any], n: int) -> dict[str, dict[str, Any]]:
    """core_v1 and core_v2 as scores of report.json, from `aggregate`'s table; n examples in all.

    With tasks missing the scores are named core_v1_partial and so on, and say how many they cover.
    """
    missing = len(table["missing"])
    scores = {}
    for version in VERSIONS:
        value = table[f"present_{version}"]
        if value is None:
            continue
        half = Z95 * table[f"stderr_{version}"]
        score = {
            "value": value,
            "low": value - half,
            "high": value + half,
            "n": n,
            "chance": 0.0,
            "unit": "centred accuracy",
        }
        if missing:
            score["note"] = (
                f"mean of {len(CORE_TASKS) - missing} of {len(CORE_TASKS)} tasks; missing: "
                + ", ".join(table["missing"])
            )
        scores[f"core_{version}" + ("_partial" if missing else "")] = score
    return scores


def load_rows(task: CoreTask, data: TaskData) -> Sequence[Mapping[str, Any]] | str:
    """The rows of a task, or the sentence why they cannot be had. UserError for broken rows.

    Anything that is missing is a sentence, anything that is broken an error.
    """
    name = place(task, data)
    rows = data.rows(name)
    if rows is None:
        return data.why_missing(name)
    require_rows(rows, _FIELDS[task.kind], where=name, check=_check_row(task.kind))
    return rows


def place(task: CoreTask, data: TaskData) -> str:
    """The name of a task's file in `data`: under core/eval_data/, or where nanochat's bundle lies
    unpacked (eval_bundle/eval_data/ or eval_data/); the first of these if there is none."""
    places = [f"{folder}eval_data/{task.file}" for folder in ("core/", "eval_bundle/", "")]
    return next((name for name in places if data.has_file(name)), places[0])


def _check_row(kind: Kind) -> Any:
    """A function that says what is wrong with a row, or None."""
    options_key = "choices" if kind == "multiple_choice" else "context_options"

    def check(row: Mapping[str, Any]) -> str | None:
        for key in _FIELDS[kind]:
            if key in (options_key, "gold"):
                continue
            if not isinstance(row[key], str):
                return f"{key!r} is not text"
        if kind == "language_modeling":
            return None if row["continuation"].strip() else "'continuation' is empty"
        options, gold = row[options_key], row["gold"]
        if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            return f"{options_key!r} is not a list of texts"
        if len(options) < 2:
            return f"{options_key!r} has {len(options)} entries: there is nothing to choose"
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
            return f"'gold' is {gold!r}, not an index of {options_key!r}"
        return None

    return check
