"""Which layers hold on this machine, why one does not, and what a call costs.

`fledge doctor` and `fledge bench sandbox` print it. Every layer is put to its canary attacks
(`selftest`) here as it is before its first use; nothing in this module switches a layer on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fledge.sandbox import arithmetic, selftest
from fledge.sandbox.interpreter import Interpreter
from fledge.sandbox.process import CPython

SUM = "(347+58)*3"
ROUNDS = 21


@dataclass(frozen=True)
class Layer:
    """One layer: whether it may be used here (`why` is the sentence if not) and its latency."""

    name: str
    what: str
    holds: bool
    why: str | None = None
    median_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Layer]:
    """All layers, tried now; takes about a second, most of it the start of the processes."""
    with Interpreter(workers=1) as monty, CPython(workers=1) as cpython:
        why = cpython.why_unavailable()
        walls = "seccomp, rlimits, uid {uid}, Landlock {landlock}".format(**cpython.facts or _NONE)
        return [
            _layer("L0", "calculator", selftest.check_arithmetic(), arithmetic.evaluate),
            _layer("L1", "Python in Monty", monty.why_unavailable(), monty.run),
            _layer("L2", f"CPython ({walls})" if why is None else "CPython", why, cpython.run),
        ]


_NONE = {"uid": None, "landlock": None}


def _layer(name: str, what: str, why: str | None, run: Callable[[str], Any]) -> Layer:
    if why is not None:
        return Layer(name, what, holds=False, why=why)
    return Layer(name, what, holds=True, median_ms=median(latencies(run, SUM, ROUNDS)))


def latencies(run: Callable[[str], Any], code: str, rounds: int) -> list[float]:
    """Wall milliseconds of each of `rounds` calls in a row."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run(code)
        times.append((time.perf_counter() - began) * 1e3)
    return times
