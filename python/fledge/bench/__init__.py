"""`fledge bench`: measurements of this machine, each beside a peer measured in the same run.

`BENCHES` names what can be measured; one module each, whose function returns rows of results. A
further bench is a module and an entry. Called by the command line only. A bench prints ratios and
gates on nothing: how fast a machine is, is no test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fledge.plan import hardware


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

    function: Callable[[], tuple[list[dict[str, Any]], list[str]]]
    summary: str
    text: Callable[[list[dict[str, Any]]], str] | None = None  # None: `results_text`'s columns


def measure(name: str) -> dict[str, Any]:
    """{"machine", "results", "notes"}: the shape that `fledge bench --json` prints."""
    rows, notes = BENCHES[name].function()
    return {"machine": hardware.detect().to_dict(), "results": rows, "notes": notes}


def results_text(name: str, measured: dict[str, Any]) -> str:
    """The measurements for people."""
    text = BENCHES[name].text
    if text is not None:
        return "\n".join([text(measured["results"]), *measured["notes"]]) + "\n"
    lines = [f"{'':28} {'value':>10} {'95 % interval':>21}   peer"]
    for row in measured["results"]:
        interval = f"[{row['low']:,.3g}, {row['high']:,.3g}]"
        peer = ""
        if row["peer"] is not None:
            peer = f"{row['peer']} {row['peer_value']:,.3g}, ratio {row['ratio']:.3g}"
        value = f"{row['value']:,.3g} {row['unit']}"
        lines.append(f"{row['name']:28} {value:>10} {interval:>21}   {peer}".rstrip())
    return "\n".join([*lines, *measured["notes"]]) + "\n"


def _sandbox() -> tuple[list[dict[str, Any]], list[str]]:
    from fledge.bench import sandbox

    rows, notes = sandbox.run()
    return [row.to_dict() for row in rows], notes


def _tok() -> tuple[list[dict[str, Any]], list[str]]:
    from fledge.bench import tok

    return tok.run_default()


def _tok_text(rows: list[dict[str, Any]]) -> str:
    from fledge.bench import tok

    return tok.table(rows)


def _infer() -> tuple[list[dict[str, Any]], list[str]]:
    from fledge.bench import infer

    return infer.run_default()


BENCHES = {
    "infer": Bench(_infer, "the engine on this CPU beside transformers with the same weights"),
    "sandbox": Bench(_sandbox, "what a call of each sandbox layer costs here"),
    "tok": Bench(
        _tok, "the tokenizer beside its peers (options: `fledge tok bench --help`)", _tok_text
    ),
}
