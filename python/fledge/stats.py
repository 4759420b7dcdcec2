"""Small statistics: intervals of scores, paired differences and the entropy of answers.

Used by evals and the report, so that no score stands without its uncertainty. Pure functions.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution: two-sided 95 %."""


def wilson_interval(correct: int, n: int, *, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a share `correct` / `n` (Wilson 1927): honest near 0 and 1 and for small n.

    (0, 1) when nothing was counted.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is not a share")
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at the ends the formula gives 0 and 1 exactly, up to rounding
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


def bootstrap_interval(
    values: Sequence[float],
    *,
    statistic: Callable[[Sequence[float]], float] = fmean,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic by drawing from the values anew (Efron 1979).

    The same seed gives the same interval. Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1 - confidence) / 2
    last = resamples - 1
    return found[math.floor(tail * last)], found[math.ceil((1 - tail) * last)]


def paired_difference(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(difference of the means, low, high) of the same examples scored twice, after - before.

    A paired bootstrap: examples are drawn, each with both its scores, so what is hard for both
    models cancels. Raises ValueError if the two do not pair up.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers cannot be paired with {len(after)}")
    changes = [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    low, high = bootstrap_interval(changes, resamples=resamples, seed=seed)
    return fmean(changes), low, high


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """{"before", "after", "difference", "low", "high", "n", "significant"} of paired scores.

    `paired_difference` for many examples: the differences take few distinct values, so the counts
    of a resample are multinomial and no example is drawn one by one. `significant` means that the
    95 % interval leaves out 0. Raises ValueError without pairs.
    """
    draws = resampled_differences(before, after, resamples=resamples, seed=seed)
    return difference_row(fmean(before), fmean(after), draws, len(before))


def resampled_differences(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> np.ndarray:
    """Resampled means of after - before, [resamples]. numpy is imported here only."""
    import numpy as np

    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} answers cannot be paired with {len(after)}")
    values, counts = np.unique(np.subtract(after, before), return_counts=True)
    n = len(before)
    return np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ values / n


def difference_row(before: float, after: float, draws: np.ndarray, n: int) -> dict[str, Any]:
    """The shape of a compared score, from its resampled differences."""
    import numpy as np

    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "before": float(before),
        "after": float(after),
        "difference": float(after - before),
        "low": float(low),
        "high": float(high),
        "n": n,
        "significant": bool(low > 0 or high < 0),
    }


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error: sample deviation / sqrt(n)); the error is nan for one value.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    squares = math.fsum((v - mean) ** 2 for v in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def share_stderr(correct: int, n: int) -> float:
    """Standard error of a share, by the sample deviation (as lm-eval reports it); nan for n < 2."""
    if n < 2:
        return math.nan
    share = correct / n
    return math.sqrt(share * (1 - share) / (n - 1))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of passing at least once in k tries, from `correct` of n tries.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374). "Any of n" is biased upwards.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} cannot be told from {correct} of {n} tries")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def entropy_bits(items: Iterable[Hashable]) -> float:
    """Shannon entropy of the distribution of the items, in bits (0 for none or one kind)."""
    counts = Counter(items)
    total = counts.total()
    return sum(-c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def majority_share(items: Iterable[Hashable]) -> float:
    """Share of the commonest item: what always giving one answer would score."""
    counts = Counter(items)
    return max(counts.values(), default=0) / max(1, counts.total())


def format_percent(share: float) -> str:
    """ "1.5 %", "25 %": one digit behind the point unless it is 0, for every share that is shown.

    Whole percents would make 1 % of 0.0149 and 2 % of 0.015.
    """
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def format_interval(value: float, low: float, high: float, *, percent: bool = True) -> str:
    """ "71.5 % (65.2 to 77.1)", or with three digits when it is no share."""
    if percent:
        return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
