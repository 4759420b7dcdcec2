"""A whole run whose losses go wrong: survived, told in the log and the metrics, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fledge import cli
from fledge.model import Transformer
from tests.helpers_mini import assert_three_parts, write_recipe

pytestmark = pytest.mark.timeout(900)
PASSES = 20  # base: 20 steps of one pass each, a checkpoint every 3


def run_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil) -> tuple[int, Path]:
    """`fledge run mini --until base` with `spoil(model, pass)` before every training pass."""
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    healthy, count = Transformer.add_gradients, iter(range(10**9))

    def watched(self, ids, targets, weights):
        weights = spoil(self, next(count), weights)
        return healthy(self, ids, targets, weights)

    monkeypatch.setattr(Transformer, "add_gradients", watched)
    words = ("run", recipe, "--out", out, "--until", "base", "--base.device_batch_size", "4")
    return cli.main([*map(str, words)]), out


def metrics(out: Path) -> list[dict]:
    return [json.loads(x) for x in (out / "base" / "metrics.jsonl").read_text().splitlines()]


def test_nan_in_one_step_is_survived_and_logged(tmp_path, monkeypatch):
    code, out = run_base(
        tmp_path, monkeypatch, lambda _, n, weights: weights * (float("nan") if n == 7 else 1.0)
    )
    assert code == 0
    rows = metrics(out)
    assert [row["step"] for row in rows if row.get("skipped")] == [8] and len(rows) == PASSES
    assert "step 8 was skipped" in (out / "base" / "log.txt").read_text()
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_spoilt_weights_go_back_to_the_last_checkpoint(tmp_path, monkeypatch):
    def spoil(model, n, weights):
        if n == 10:
            with torch.no_grad():
                model.get_parameter("model.norm.weight").fill_(float("inf"))
        return weights

    code, out = run_base(tmp_path, monkeypatch, spoil)
    assert code == 0
    rows = metrics(out)
    assert [row["step"] for row in rows if row.get("skipped")] == [11, 12, 13, 14, 15]
    assert [row["rolled_back_to"] for row in rows if "rolled_back_to" in row] == [9]
    assert "back to the weights of step 9" in (out / "base" / "log.txt").read_text()
    final = Transformer.load(out / "base" / "checkpoints" / "step_000020")
    assert all(torch.isfinite(p).all() for p in final.parameters())


def test_a_loss_that_stays_bad_is_the_last_resort(tmp_path, monkeypatch, capsys):
    code, out = run_base(
        tmp_path, monkeypatch, lambda _, n, weights: weights * (float("nan") if n > 6 else 1.0)
    )
    assert code == 1
    err = capsys.readouterr().err
    assert_three_parts(err)
    assert "diverged" in err
    assert [row.get("rolled_back_to") for row in metrics(out)][11] == 6


def test_out_of_memory_in_a_run_halves_the_pass(tmp_path, monkeypatch):
    def cramped(_, n, weights):
        if len(weights) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return weights

    code, out = run_base(tmp_path, monkeypatch, cramped)
    assert code == 0
    log = (out / "base" / "log.txt").read_text()
    assert "going on with 2 rows at a time" in log and "going on with 1 rows at a time" in log
    assert len(metrics(out)) == PASSES


def test_a_speedrun_network_goes_through_every_stage(tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    words = ("run", recipe, "--out", out, "--model.arch", "speedrun", "--model.depth", "2")
    assert cli.main([*map(str, words)]) == 0
    last = out / "rl" / "checkpoints"
    (folder,) = (p for p in last.iterdir() if p.name == (out / "rl" / "LATEST").read_text().strip())
    assert (folder / "modeling_fledge.py").is_file()
    assert Transformer.load(folder).config.smear
