"""Showing how far long work has come: the stage and the whole run, rate and time left.

On a terminal a live bar (rich), elsewhere one plain line per logging event, at most one a second,
both on standard error; the plain lines also go to the stage's log.txt. Made by the pipeline and
handed to the stages. It never writes metrics (`fledge.runlog.MetricsLog` does) and decides nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO


def format_seconds(seconds: float) -> str:
    """Short words for a duration: 8 s, 3 min 05 s, 2 h 10 min, 3.1 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"


def format_count(number: float) -> str:
    """Short form of a large count: 950, 4.1K, 3.4M, 1.2B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number:.3g}"
    return f"{number:.3g}"


class Progress:
    """Progress of a run through its stages.

    `weights` gives the planned share (seconds, say) of each stage, so that the whole run's
    percentage is honest; a stage that is not in it counts nothing.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        line_every_seconds: float = 1.0,
    ) -> None:
        self._weights = dict(weights or {})
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._line_every = line_every_seconds
        self._finished: set[str] = set()
        self._name = ""
        self._total = 0.0
        self._unit = ""
        self._done = 0.0
        self._first = 0.0
        self._began = self._last_line = self._run_began = clock()
        self._skipped = 0.0
        self._log: TextIO | None = None
        self._live: Any = None
        self._tasks: tuple[Any, Any] | None = None

    def stage(
        self, name: str, total: float, unit: str, *, done: float = 0, log: Path | None = None
    ) -> None:
        """Begin a stage of `total` units, `done` of them before; `log` gets its lines."""
        self._end_stage()
        self._name, self._total, self._unit = name, max(float(total), 1e-9), unit
        self._done = self._first = float(done)
        self._began = self._clock()
        if done and name in self._weights:  # worked off by an earlier process
            self._skipped += self._weights[name] * min(1.0, self._done / self._total)
        self._last_line = self._began - self._line_every
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log, "a", encoding="utf-8")  # noqa: SIM115  (closed by _end_stage)
        if self._is_terminal():
            self._start_live()

    def skip(self, name: str, why: str = "already done") -> None:
        """Say that a stage needs no work and count it as done."""
        self._finished.add(name)
        self._skipped += self._weights.get(name, 0.0)
        self.note(f"{name}: {why}")

    def update(self, done: float, **info: Any) -> None:
        """`done` units of the stage are done; `info` is shown beside it (loss=..., bpb=...)."""
        self._done = float(done)
        line = self._line(info)
        if self._live is not None:
            stage_task, run_task = self._tasks or (None, None)
            self._live.update(stage_task, completed=self._done, facts=_facts(info))
            self._live.update(run_task, completed=100 * self.share())
            self._write_log(line)
            return
        now = self._clock()
        if now - self._last_line >= self._line_every or self._done >= self._total:
            self._last_line = now
            self._write_log(line)
            print(line, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """One plain line, above the bar if there is one."""
        self._write_log(text)
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def share(self) -> float:
        """Share of the whole run that is done, 0 to 1, by the planned weights."""
        total = sum(self._weights.values())
        if total <= 0:
            return min(1.0, self._done / self._total) if self._total else 0.0
        done = sum(w for n, w in self._weights.items() if n in self._finished)
        if self._name not in self._finished and self._total:
            done += self._weights.get(self._name, 0.0) * min(1.0, self._done / self._total)
        return done / total

    def seconds_left(self) -> float | None:
        """Estimate for the stage from its own rate; None before there is one."""
        worked, elapsed = self._done - self._first, self._clock() - self._began
        if worked <= 0 or elapsed <= 0:
            return None
        return (self._total - self._done) * elapsed / worked

    def run_seconds_left(self) -> float | None:
        """Estimate for the whole run from this process's pace; None in the first hundredth."""
        total = sum(self._weights.values())
        worked = self.share() * total - self._skipped
        if worked < 0.01 * total or not total:
            return None
        return (1 - self.share()) * total * (self._clock() - self._run_began) / worked

    def close(self) -> None:
        """End the stage and take the bar away."""
        self._end_stage()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the two faces ---------------------------------------------------------------------------

    def _is_terminal(self) -> bool:
        return bool(getattr(self._stream, "isatty", lambda: False)())

    def _line(self, info: Mapping[str, Any]) -> str:
        left = self.seconds_left()
        parts = [f"{self._name} {self._done:.6g}/{self._total:.6g} {self._unit}"]
        parts += [_facts(info)] if info else []
        parts += [f"{format_seconds(left)} left"] if left is not None and left > 0 else []
        parts += [self._whole_run()] if self._weights else []
        return " | ".join(parts)

    def _whole_run(self) -> str:
        left = self.run_seconds_left()
        shown = f", {format_seconds(left)} left" if left else ""
        return f"run {100 * self.share():.0f}%{shown}"

    def _write_log(self, line: str) -> None:
        if self._log is not None:
            print(line, file=self._log, flush=True)

    def _start_live(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._live = Bars(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[facts]}"),
            console=Console(file=self._stream),
            transient=True,
        )
        stage_task = self._live.add_task(
            self._name, total=self._total, completed=self._done, facts=""
        )
        run_task = self._live.add_task(
            "whole run", total=100, completed=100 * self.share(), facts=""
        )
        self._tasks = (stage_task, run_task)
        self._live.start()

    def _end_stage(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._tasks = None, None
            print(self._line({}), file=self._stream, flush=True)
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._name and self._done >= self._total:
            self._finished.add(self._name)


def _facts(info: Mapping[str, Any]) -> str:
    return " ".join(f"{key} {_short(value)}" for key, value in info.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else format_count(value)
    return format_count(value) if isinstance(value, int) and value >= 100000 else str(value)


class Silence(Progress):
    """Progress that nobody sees: of the ranks that do not lead."""

    def stage(
        self, name: str, total: float, unit: str, *, done: float = 0, log: Path | None = None
    ) -> None:
        """Nothing."""

    def skip(self, name: str, why: str = "already done") -> None:
        """Nothing."""

    def update(self, done: float, **info: Any) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
