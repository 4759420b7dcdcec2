"""Choices: stable draws, exact bits."""

from __future__ import annotations

from collections import Counter
from math import isclose, log2, perm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.data.worlds.choices import Choices, Template, Weighted


def test_the_same_key_draws_the_same_and_these_draws_never_change() -> None:
    choices = Choices("a key")
    drawn = [choices.integer(0, 999) for _ in range(6)]
    assert drawn == [Choices("a key").integer(0, 999), *drawn[1:]]
    assert drawn == STORED


STORED = [572, 74, 188, 494, 266, 633]


def test_bits_are_minus_log2_of_the_path() -> None:
    choices = Choices("bits")
    choices.choice("abcdefgh")
    assert isclose(choices.bits, 3)
    choices.integer(1, 32)
    assert isclose(choices.bits, 8)
    choices.sample(range(10), 3)
    assert isclose(choices.bits, 8 + log2(perm(10, 3)))
    before = choices.bits
    hit = choices.chance(0.25)
    assert isclose(choices.bits - before, 2 if hit else log2(4 / 3))
    before = choices.bits
    item = choices.weighted(Weighted({"x": 3.0, "y": 1.0}))
    assert isclose(choices.bits - before, {"x": log2(4 / 3), "y": 2}[item])


@given(st.integers(1, 40), st.data())
def test_samples_are_distinct(size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, size))
    drawn = Choices(f"s{size}").sample(range(size), k)
    assert len(set(drawn)) == k and all(0 <= x < size for x in drawn)


def test_mean_bits_of_a_weighted_draw_is_its_entropy() -> None:
    options = Weighted({"a": 0.5, "b": 0.25, "c": 0.25})
    choices = Choices("mean")
    counts = Counter(choices.weighted(options) for _ in range(4000))
    assert choices.bits / 4000 == pytest.approx(1.5, abs=0.05)
    assert counts["a"] / 4000 == pytest.approx(0.5, abs=0.04)


def test_a_numbered_slot_keeps_its_value() -> None:
    template = Template("{p} has {n1} {things}, yes {n1}.")
    text = template.fill(Choices("t"), {"p": "Ann"}, {"n": range(10, 99), "things": ["pots"]})
    words = text.split()
    assert words[0] == "Ann" and words[2] == words[-1].rstrip(".")
