"""A model's exam on one CORE task: prompts scored, the best candidate picked, records kept.

multiple_choice and schema: the candidate with the lowest mean cross-entropy per scored token wins.
language_modeling: right if every token of the continuation is the likeliest one. Called by
`suite`; what the tasks are stands in `core`, how prompts look in `core_prompts`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fledge.dist import World
from fledge.engine import Engine
from fledge.evals.core import CoreTask
from fledge.evals.core_prompts import Example, Profile, Span, examples
from fledge.evals.examine import TaskResult
from fledge.evals.records import Record, examine_in_chunks
from fledge.evals.scoring import Likelihood, Request, loglikelihood
from fledge.stats import Z95, mean_and_stderr, share_stderr, wilson_interval

PREFIX = "core/"  # of a CORE task beside the chat tasks: both have an arc_easy


def examine_core_task(
    engine: Engine,
    task: CoreTask,
    rows: Sequence[Mapping[str, Any]],
    *,
    profile: Profile = "nanochat",
    max_examples: int | None = None,
    deterministic: bool = False,
    batch_size: int | None = None,
    partial: Path | None = None,
    key: str = "",
    world: World | None = None,
    after_chunk: Callable[[int], None] | None = None,
) -> TaskResult:
    """The accuracy on a task with interval, standard error and records."""
    began = time.perf_counter()
    limit = engine.model.config.max_position_embeddings
    prompts = examples(
        task,
        rows,
        engine.tokenizer,
        profile=profile,
        max_examples=max_examples,
        context=limit,
    )
    asked = [_packed(example) for example in prompts]

    def score(indices: list[int]) -> list[Record]:
        requests = [Request([*s.ids], s.start) for i in indices for s in asked[i].spans]
        found = iter(
            loglikelihood(engine, requests, deterministic=deterministic, batch_size=batch_size)
        )
        return [
            _record(task, asked[i], rows[asked[i].place], [next(found) for _ in asked[i].spans])
            for i in indices
        ]

    records = examine_in_chunks(
        [len(example.spans[0].ids) for example in asked],
        score,
        partial=partial,
        key=key,
        world=world,
        after_chunk=after_chunk,
    )
    ordered = [records[i] for i in sorted(records)]
    return core_result(task, ordered, profile, limit, seconds=time.perf_counter() - began)


def _packed(example: Example) -> Example:
    """The same with its ids as 32-bit numbers: all prompts of hellaswag are 36 million tokens."""
    spans = [Span(array("i", span.ids), span.start) for span in example.spans]
    return dataclasses.replace(example, spans=spans)


def core_result(
    task: CoreTask, records: Sequence[Record], profile: Profile, limit: int, *, seconds: float
) -> TaskResult:
    """The score of records; dclm's jeopardy is the mean over its categories, all else over rows."""
    correct = [bool(record["correct"]) for record in records]
    n = len(correct)
    value = sum(correct) / n
    stderr = share_stderr(sum(correct), n)
    low, high = wilson_interval(sum(correct), n)
    if profile == "dclm" and task.name == "jeopardy":
        value, stderr = _macro(records)
        low, high = max(0.0, value - Z95 * stderr), min(1.0, value + Z95 * stderr)
    cut = sum(1 for record in records if record["truncated"])
    note = f"{cut} of {n} prompts lost their beginning: longer than {limit} tokens" if cut else None
    return TaskResult(
        name=PREFIX + task.name,
        value=value,
        low=low,
        high=high,
        n=n,
        chance=0.01 * task.baseline_v1,
        seconds=seconds,
        records=list(records),
        note=note,
        stderr=stderr,
        details={
            "profile": profile,
            "shots": task.shots,
            "truncated": cut,
            "centred_v1": task.centred(value, "v1"),
            "centred_v2": task.centred(value, "v2"),
            "guessing": guessing(records),
        },
    )


def guessing(records: Sequence[Record]) -> float:
    """Mean of 1 / number of candidates: what an untrained model scores; 0 for exact continuations.

    Not the published baseline: boolq's 62 % and commonsense_qa's 40.3 % are something else.
    """
    return sum(1 / len(r["ids"]) if len(r["ids"]) > 1 else 0.0 for r in records) / len(records)


def _macro(records: Sequence[Record]) -> tuple[float, float]:
    """(mean over categories of their accuracies, its standard error)."""
    by_category: dict[Any, list[float]] = {}
    for record in records:
        by_category.setdefault(record.get("category"), []).append(float(record["correct"]))
    means, squares = [], 0.0
    for scores in by_category.values():
        mean, error = mean_and_stderr(scores)
        means.append(mean)
        squares += 0.0 if math.isnan(error) else error**2
    return sum(means) / len(means), math.sqrt(squares) / len(means)


def _record(
    task: CoreTask, example: Example, row: Mapping[str, Any], likelihoods: list[Likelihood]
) -> Record:
    spans = example.spans
    tokens = np.concatenate([np.asarray([len(s.ids), *s.ids], np.int64) for s in spans])
    record: Record = {
        "id": f"{PREFIX}{task.name}/{example.place}",
        "prompt_hash": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
        "prompt_tokens": max(len(span.ids) for span in spans),
        "truncated": example.truncated,
        "question": example.prompt[-400:],
        "ids": [[*span.ids[span.start :]] for span in spans],
        "logprobs": [[round(x, 6) for x in found.logprobs] for found in likelihoods],
    }
    if example.category is not None:
        record["category"] = example.category
    if task.kind == "language_modeling":
        correct = likelihoods[0].is_greedy
        record |= {"answer": row["continuation"], "output": "greedy" if correct else "other"}
    else:
        means = [found.mean for found in likelihoods]
        best = means.index(max(means))
        options = row["choices" if task.kind == "multiple_choice" else "context_options"]
        correct = best == example.gold
        record |= {"answer": options[example.gold or 0], "output": options[best], "picked": best}
    return record | {"correct": correct, "score": float(correct)}
