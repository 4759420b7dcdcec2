"""fledge.stats against closed forms, known values and coverage."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.stats import (
    bootstrap_interval,
    entropy_bits,
    format_interval,
    majority_share,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(0, 500))
def test_wilson_holds_the_share_and_is_symmetric(a: int, b: int) -> None:
    correct, n = min(a, b), max(a, b)
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= correct / n <= high
    mirrored = wilson_interval(n - correct, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_refuses_what_is_no_share() -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(3, 2)


def test_wilson_covers_the_truth_about_19_times_in_20() -> None:
    draw, hits = random.Random(1), 0
    for _ in range(2000):
        correct = sum(draw.random() < 0.3 for _ in range(60))
        low, high = wilson_interval(correct, 60)
        hits += low <= 0.3 <= high
    assert 0.93 < hits / 2000 < 0.97


def test_bootstrap_agrees_with_the_normal_interval_and_repeats() -> None:
    draw = random.Random(2)
    values = [draw.gauss(5, 2) for _ in range(400)]
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    mean = sum(values) / 400
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 399 / 400)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.25 * half)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])


def test_paired_difference() -> None:
    before = [False] * 50 + [True] * 50
    difference, low, high = paired_difference(before, [True] * 100)
    assert difference == 0.5 and 0.35 < low < 0.5 < high < 0.65
    assert paired_difference(before, before) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="paired"):
        paired_difference(before, [True])


@given(st.lists(st.integers(0, 5), min_size=1))
def test_entropy_is_between_nothing_and_the_number_of_kinds(items: list[int]) -> None:
    entropy = entropy_bits(items)
    assert -1e-12 <= entropy <= math.log2(len(set(items))) + 1e-9
    # the commonest answer can never be rarer than the entropy allows
    assert majority_share(items) >= 2 ** -(entropy + 1e-9)


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits("abcd") == 2.0
    assert entropy_bits([]) == 0.0 == majority_share([])
    assert entropy_bits("aaab") == pytest.approx(0.8112781)


def test_format_interval() -> None:
    assert format_interval(0.715, 0.652, 0.771) == "71.5 % (65.2 to 77.1)"
    assert format_interval(1.0, 0.9, 1.1, percent=False) == "1.000 (0.900 to 1.100)"
