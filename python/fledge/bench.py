"""`fledge bench`: measurements of this machine, each beside a peer measured in the same run.

`BENCHES` names what can be measured; one function each, which returns rows of `Row`. A further
bench is a function and an entry. Called by the command line only. A bench prints ratios and gates
on nothing: how fast a machine is, is no test.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import ceil
from statistics import median
from typing import Any

from fledge.plan import hardware
from fledge.sandbox import arithmetic, layers, selftest
from fledge.sandbox.interpreter import Interpreter
from fledge.sandbox.layers import SUM
from fledge.sandbox.process import CPython
from fledge.stats import bootstrap_interval


@dataclass(frozen=True)
class Row:
    """One measurement and its 95 % interval; `ratio` = value / peer_value, None without a peer."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    peer: str | None = None
    peer_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        ratio = self.value / self.peer_value if self.peer_value else None
        return asdict(self) | {"ratio": ratio}


@dataclass(frozen=True)
class Bench:
    """What `fledge bench NAME` does."""

    function: Callable[[], tuple[list[Row], list[str]]]
    summary: str


def measure(name: str) -> dict[str, Any]:
    """{"machine", "results", "notes"}: the shape that `fledge bench --json` prints."""
    rows, notes = BENCHES[name].function()
    return {
        "machine": hardware.detect().to_dict(),
        "results": [row.to_dict() for row in rows],
        "notes": notes,
    }


def results_text(measured: dict[str, Any]) -> str:
    """The measurements for people."""
    lines = [f"{'':28} {'value':>10} {'95 % interval':>21}   peer"]
    for row in measured["results"]:
        interval = f"[{row['low']:,.3g}, {row['high']:,.3g}]"
        peer = ""
        if row["peer"] is not None:
            peer = f"{row['peer']} {row['peer_value']:,.3g}, ratio {row['ratio']:.3g}"
        value = f"{row['value']:,.3g} {row['unit']}"
        lines.append(f"{row['name']:28} {value:>10} {interval:>21}   {peer}".rstrip())
    return "\n".join([*lines, *measured["notes"]]) + "\n"


# -- sandbox ---------------------------------------------------------------------------------------

THREADS = 8


def sandbox() -> tuple[list[Row], list[str]]:
    """Latency of each layer that holds here, and runs a second of L2 from several threads."""
    rows: list[Row] = []
    notes: list[str] = []

    def layer(name: str, why: str | None, run: Callable[[str], Any], peer: str, times: list[float]):
        if why is not None:
            notes.append(f"{name} is off: {why}")
            return
        layers.latencies(run, SUM, 20)  # start-up is not part of it
        rows.extend(latency_rows(name, layers.latencies(run, SUM, 1000), peer, times))

    process = layers.latencies(_plain_process, SUM, 30)
    layer(
        "L0 calculator",
        selftest.check_arithmetic(),
        arithmetic.evaluate,
        "eval in process",
        layers.latencies(eval, SUM, 1000),
    )
    with Interpreter() as monty:
        layer("L1 Monty", monty.why_unavailable(), monty.run, "python -I -S", process)
    with CPython() as cpython:
        why = cpython.why_unavailable()
        layer("L2 CPython", why, cpython.run, "python -I -S", process)
        if why is None:
            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(cpython.run, [SUM] * 50))
                rates = [_rate(threads, cpython.run, 200) for _ in range(10)]
                peer = _rate(threads, _plain_process, 50)
            low, high = bootstrap_interval(rates, statistic=median)
            name = f"L2 CPython, {THREADS} threads"
            rows.append(Row(name, median(rates), "/s", low, high, "python -I -S", peer))
    return rows, notes


def latency_rows(name: str, times: list[float], peer: str, peer_times: list[float]) -> list[Row]:
    """Median and 99th percentile of milliseconds, each beside the peer's."""
    rows = []
    for label, statistic in (("median", median), ("p99", percentile_99)):
        low, high = bootstrap_interval(times, statistic=statistic, resamples=200)
        value = statistic(times)
        rows.append(
            Row(f"{name}, {label}", value, "ms", low, high, peer, statistic(peer_times))
        )  # fmt: skip
    return rows


def percentile_99(values: Sequence[float]) -> float:
    return sorted(values)[ceil(0.99 * len(values)) - 1]


def _plain_process(code: str) -> None:
    """The peer: a fresh Python with no wall at all."""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def _rate(threads: ThreadPoolExecutor, run: Callable[[str], Any], count: int) -> float:
    began = time.perf_counter()
    list(threads.map(run, [SUM] * count))
    return count / (time.perf_counter() - began)


BENCHES = {"sandbox": Bench(sandbox, "what a call of each sandbox layer costs here")}
