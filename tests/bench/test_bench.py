"""`fledge bench`: the shape of what it prints; no figure is judged here."""

from __future__ import annotations

import json

import pytest

from fledge import bench, cli
from fledge.bench import Bench, Row
from fledge.bench import sandbox as sandbox_bench
from fledge.sandbox import layers
from fledge.sandbox.process import CPython

RESULT_KEYS = {"name", "value", "unit", "peer", "peer_value", "ratio", "low", "high"}


def test_json_has_the_shape_of_the_design(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("a", 2.0, "ms", 1.5, 2.5, "b", 4.0), Row("c", 1.0, "/s", 1.0, 1.0)]
    monkeypatch.setitem(
        bench.BENCHES, "sandbox", Bench(lambda: ([r.to_dict() for r in rows], ["L2 is off: x"]), "")
    )
    assert cli.main(["bench", "sandbox", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"machine", "results", "notes"}
    assert all(set(row) == RESULT_KEYS for row in printed["results"])
    assert [row["ratio"] for row in printed["results"]] == [0.5, None]
    assert cli.main(["bench", "sandbox"]) == 0
    text = capsys.readouterr().out
    assert "ratio 0.5" in text and text.endswith("L2 is off: x\n")


def test_every_bench_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in bench.BENCHES)


def test_the_sandbox_bench_measures_every_layer_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = layers.latencies
    monkeypatch.setattr(layers, "latencies", lambda run, code, n: real(run, code, min(n, 3)))
    monkeypatch.setattr(sandbox_bench, "_rate", lambda threads, run, count: float(count))
    rows, notes = sandbox_bench.run()
    said = " ".join([row.name for row in rows] + notes)
    assert all(name in said for name in ("L0 calculator", "L1 Monty", "L2 CPython"))
    assert all(row.low <= row.value <= row.high for row in rows)
    monkeypatch.setattr(CPython, "why_unavailable", lambda self: "no reason")
    rows, notes = sandbox_bench.run()
    assert "L2 CPython is off: no reason" in notes
    assert not [row for row in rows if row.name.startswith("L2")]


def test_p99() -> None:
    assert sandbox_bench.percentile_99([float(i) for i in range(1000)]) == 989.0
    assert sandbox_bench.percentile_99([7.0]) == 7.0
