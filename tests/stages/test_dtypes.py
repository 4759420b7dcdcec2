"""Whole stages in other dtypes: they run, stop and go on bit for bit, on one process and on two."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from fledge import cli
from fledge.model import Transformer
from tests.helpers_mini import artefacts, differences, fledge, write_recipe

pytestmark = pytest.mark.timeout(900)  # seconds of work, but the machine may be busy


def metrics(run: Path, stage: str = "base") -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def run(recipe: Path, out: Path, *words: object) -> None:
    done = cli.main([*map(str, ("run", recipe, "--out", out, *words))])
    assert done == 0


def stop_at_pass(patch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM, once, when the network makes its gradients for the `number`-th time."""
    whole, count = Transformer.add_gradients, iter(range(10**9))

    def stop_once(self, ids, targets, weights):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, ids, targets, weights)

    patch.setattr(Transformer, "add_gradients", stop_once)


def test_every_stage_in_float16_stops_and_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is part of what is saved: it grows every two steps here."""
    monkeypatch.setattr("fledge.train.loss_scale.GROW_AFTER", 2)
    recipe = write_recipe(tmp_path)
    words = ("--hardware.dtype", "float16", "--until", "rl")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(recipe, whole, *words)
    with monkeypatch.context() as patch:
        stop_at_pass(patch, 7)
        assert cli.main([*map(str, ("run", recipe, "--out", halves, *words))]) == 75
    state = next((halves / "base" / "checkpoints").iterdir()) / "train_state" / "state.json"
    assert json.loads(state.read_text())["loss_scale"]["value"] > 2**16
    run(recipe, halves, *words)
    assert differences(artefacts(whole), artefacts(halves)) == []
    scales = [row["loss_scale"] for row in metrics(whole)]
    assert scales[:4] == [2**16, 2**17, 2**17, 2**18]
    assert "gradients beyond float16; again" in (whole / "base" / "log.txt").read_text()
    assert not any("skipped" in row for row in metrics(whole))
    assert "computes in float16" in (whole / "base" / "log.txt").read_text()


def test_rounded_products_stop_and_go_on_bit_for_bit_and_rl_leaves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a processor with fast bfloat16 does without being asked."""
    recipe = write_recipe(tmp_path)
    words = ("--hardware.dtype", "bfloat16_products")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(recipe, whole, *words)
    with monkeypatch.context() as patch:
        stop_at_pass(patch, 7)
        assert cli.main([*map(str, ("run", recipe, "--out", halves, *words))]) == 75
    run(recipe, halves, *words)
    assert differences(artefacts(whole), artefacts(halves)) == []
    said = {stage: (whole / stage / "log.txt").read_text() for stage in ("base", "sft", "rl")}
    assert "computes in bfloat16_products" in said["base"]
    assert "computes in bfloat16_products" in said["sft"]
    assert "rl: computes in float32" in said["rl"]


def test_rl_in_fp8_compares_like_with_like(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    run(recipe, out, "--hardware.dtype", "fp8", "--until", "rl")
    assert "rl: computes in bfloat16" in (out / "rl" / "log.txt").read_text()


def test_a_run_goes_on_in_another_dtype(tmp_path: Path) -> None:
    """Execution, not number: the fingerprint knows nothing of it, the checkpoint is float32."""
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    run(recipe, out, "--hardware.dtype", "bfloat16", "--until", "base")
    half = metrics(out)
    run(recipe, out, "--hardware.dtype", "fp8", "--until", "mid")
    assert metrics(out) == half  # base was done and stays
    plain = tmp_path / "plain"
    run(recipe, plain, "--until", "mid")
    for stage in ("base", "mid"):
        ours, theirs = metrics(out, stage), metrics(plain, stage)
        assert [row["loss"] for row in ours] != [row["loss"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=0.1)
            assert "loss_scale" not in a


@pytest.mark.parametrize("dtype", ["float16", "bfloat16_products"])
def test_two_ranks_equal_one_in_other_dtypes(tmp_path: Path, dtype: str) -> None:
    recipe = write_recipe(tmp_path)
    words = ("run", recipe, "--until", "base", "--hardware.dtype", dtype)
    for name, ranks in (("one", "1"), ("two", "2")):
        done = fledge(*words, "--out", tmp_path / name, "--nproc", ranks)
        assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-3)
        assert b.get("loss_scale") == a.get("loss_scale")
        assert ("loss_scale" in a) == (dtype == "float16")


def test_checkpointed_activations_leave_the_same_files(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    words = ("--until", "rl", "--model.arch", "speedrun")
    plain, again = tmp_path / "plain", tmp_path / "again"
    run(recipe, plain, *words)
    run(recipe, again, *words, "--hardware.checkpoint_activations", "True")
    found = differences(artefacts(plain), artefacts(again))
    assert [name for name in found if name.partition("/")[0] in ("base", "mid", "sft", "rl")] == []


def test_a_dtype_that_does_not_exist_is_refused(tmp_path: Path, capsys) -> None:
    recipe = write_recipe(tmp_path)
    words = ("--hardware.dtype", "int4", "--out", str(tmp_path / "run"))
    assert cli.main(["run", str(recipe), *words]) == 1
    assert "--hardware.dtype int4" in capsys.readouterr().err
    own = tmp_path / "own.toml"
    own.write_text('[hardware]\ndtype = "int4"\n')
    assert cli.main(["run", str(own), "--out", str(tmp_path / "run")]) == 1
    assert "hardware.dtype = 'int4'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
