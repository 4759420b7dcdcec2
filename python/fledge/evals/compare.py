"""Two models on the same examples: differences with paired intervals, task by task and composed.

Both models saw the same questions, so what is hard for both cancels, and the interval of the
difference is far narrower than the two intervals side by side suggest. Examples are matched by id.
Called by `fledge eval A --compare B`. Pure arithmetic on records.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from fledge.evals.core import CORE_TASKS, VERSIONS
from fledge.evals.records import Record
from fledge.evals.suite import CHATCORE
from fledge.evals.tasks.core import CORE
from fledge.stats import difference_row, resampled_differences

RESAMPLES = 10_000


def compare(
    before: Mapping[str, Sequence[Record]],
    after: Mapping[str, Sequence[Record]],
    chances: Mapping[str, float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """By task: {"before", "after", "difference", "low", "high", "n", "significant"}.

    `before` and `after` hold records by task name. Composite rows (core_v1, core_v2, chatcore)
    are there when both models took all of their tasks. `significant`: the 95 % interval of the
    paired bootstrap leaves out 0. Unmatched examples are counted in "unmatched".
    """
    rows: dict[str, dict[str, Any]] = {}
    draws: dict[str, np.ndarray] = {}
    for name in before:
        if name not in after:
            continue
        a = {r["id"]: float(r["score"]) for r in before[name]}
        b = {r["id"]: float(r["score"]) for r in after[name]}
        shared = [key for key in a if key in b]
        if not shared:
            continue
        left, right = [a[key] for key in shared], [b[key] for key in shared]
        # each task draws by itself: a common seed would tie the tasks of a composite together
        own = zlib.crc32(name.encode()) + seed
        draws[name] = resampled_differences(left, right, resamples=resamples, seed=own)
        rows[name] = difference_row(fmean(left), fmean(right), draws[name], len(shared))
        rows[name]["unmatched"] = len(a) + len(b) - 2 * len(shared)
    return rows | _composites(rows, draws, chances)


def _composites(
    rows: Mapping[str, Mapping[str, Any]],
    draws: Mapping[str, np.ndarray],
    chances: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    composed = {}
    for version in VERSIONS:
        names = {task: f"{CORE}/{task.name}" for task in CORE_TASKS}
        if all(name in rows for name in names.values()):
            slope = {n: t.centred(1.0, version) - t.centred(0.0, version) for t, n in names.items()}
            base = {n: t.centred(0.0, version) for t, n in names.items()}
            composed[f"core_{version}"] = _composite(rows, draws, slope, base)
    if all(name in rows for name in CHATCORE):
        chance = {n: 0.25 if n in CHATCORE[:3] else chances.get(n, 0.0) for n in CHATCORE}
        slope = {n: 1 / (1 - c) for n, c in chance.items()}
        base = {n: -c / (1 - c) for n, c in chance.items()}
        composed["chatcore"] = _composite(rows, draws, slope, base)
    return composed


def _composite(
    rows: Mapping[str, Mapping[str, Any]],
    draws: Mapping[str, np.ndarray],
    slope: Mapping[str, float],
    base: Mapping[str, float],
) -> dict[str, Any]:
    """The mean of slope * accuracy + base over the tasks, resampled within every task."""
    k = len(slope)
    before = sum(base[n] + s * rows[n]["before"] for n, s in slope.items()) / k
    after = sum(base[n] + s * rows[n]["after"] for n, s in slope.items()) / k
    joined = np.sum([s * draws[n] for n, s in slope.items()], axis=0) / k
    return difference_row(before, after, joined, sum(rows[n]["n"] for n in slope))
