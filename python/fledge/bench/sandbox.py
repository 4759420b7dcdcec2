"""What a call of each sandbox layer costs here, beside a fresh Python process.

`fledge bench sandbox` calls `run`. A layer that does not hold on this machine is named with its
reason. The only code it runs is one sum.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from statistics import median
from typing import Any

from fledge.bench import Row
from fledge.sandbox import arithmetic, layers, selftest
from fledge.sandbox.interpreter import Interpreter
from fledge.sandbox.layers import SUM
from fledge.sandbox.process import CPython
from fledge.stats import bootstrap_interval

THREADS = 8


def run() -> tuple[list[Row], list[str]]:
    """Latency of each layer that holds here, and runs a second of L2 from several threads."""
    rows: list[Row] = []
    notes: list[str] = []

    def layer(
        name: str, why: str | None, call: Callable[[str], Any], peer: str, times: list[float]
    ):
        if why is not None:
            notes.append(f"{name} is off: {why}")
            return
        layers.latencies(call, SUM, 20)  # start-up is not part of it
        rows.extend(latency_rows(name, layers.latencies(call, SUM, 1000), peer, times))

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
