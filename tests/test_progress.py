"""fledge.progress: honest shares, plain lines off a terminal, a bar on one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from fledge.progress import Progress, format_count, format_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_and_the_log(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    weights = {"tokenizer": 1.0, "base": 7.0, "sft": 2.0}
    with Progress(weights, stream=stream, clock=clock) as progress:
        progress.skip("tokenizer")
        progress.stage("base", 100, "steps", done=20, log=tmp_path / "base" / "log.txt")
        for step in range(21, 101):
            clock.now += 0.5
            progress.update(step, loss=1.23456, tokens=123456)
        assert progress.share() == pytest.approx(0.8)
        progress.stage("sft", 10, "steps")
        assert progress.share() == pytest.approx(0.8)
        clock.now += 1
        progress.update(5)
        assert progress.share() == pytest.approx(0.9)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tokenizer: already done"
    assert lines[1] == "base 21/100 steps | loss 1.235 tokens 123K | 40 s left | run 25%"
    # 80 steps took 40 s and are 5.6 of 7 weights; sft's 2 weights will take 14 s at that pace
    base = [line for line in lines if line.startswith("base")]
    assert base[-1].endswith("run 80%, 14 s left")
    # one line a second, not one an update
    assert 40 <= len(lines) <= 45
    assert "base 100/100 steps" in (tmp_path / "base" / "log.txt").read_text()


def test_the_rate_counts_only_this_attempt() -> None:
    clock = Clock()
    progress = Progress(stream=io.StringIO(), clock=clock)
    progress.stage("base", 100, "steps", done=90)
    assert progress.seconds_left() is None
    clock.now = 10
    progress.update(95)
    assert progress.seconds_left() == pytest.approx(10)


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress({"base": 1.0}, stream=stream) as progress:
        progress.stage("base", 10, "steps")
        progress.update(5, loss=2.0)
        progress.note("a note [with brackets]")
        progress.update(10)
    text = stream.getvalue()
    assert "a note [with brackets]" in text
    assert "whole run" in text
    assert "base 10/10 steps" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.2, "8 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (267_840, "3.1 days")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (4096, "4.1K"),
        (999_499, "999K"),
        (3_400_000, "3.4M"),
        (1.2e9, "1.2B"),
    ],
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text
