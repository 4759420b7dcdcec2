"""A sweep runs its grid once, finds the law that made the numbers, and says when it cannot."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fledge import cli, sweep
from fledge.errors import UserError
from fledge.plan import law
from fledge.plan.law import Law
from tests.helpers_mini import write_recipe

TRUE = Law(E=0.6, A=40.0, alpha=0.3, B=300.0, beta=0.4)


def runs(noise: float = 0.0) -> tuple[list[float], list[float], list[float]]:
    rng = np.random.default_rng(0)
    sizes = [2e5, 8e5, 3e6]
    rows = [(n, n * ratio) for n in sizes for ratio in (5, 20, 60) for _ in range(2)]
    losses = [TRUE.loss(n, d) * (1 + noise * rng.standard_normal()) for n, d in rows]
    return [n for n, _ in rows], [d for _, d in rows], losses


def test_the_best_ratio_is_where_the_loss_at_equal_compute_is_least() -> None:
    size = 1e6
    best = TRUE.best_tokens_per_param(size)
    assert best is not None
    compute = size * size * best

    def loss_at(parameters: float) -> float:
        return TRUE.loss(parameters, compute / parameters)

    assert loss_at(size) < min(loss_at(size * 0.9), loss_at(size * 1.1))


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_the_fit_finds_the_law_that_made_the_numbers(noise: float) -> None:
    fitted = law.fit(*runs(noise))
    assert fitted.error < 2e-3 + noise
    for size, ratio, low, high in fitted.ratios:
        expected = TRUE.best_tokens_per_param(size)
        assert ratio is not None and expected is not None
        assert ratio == pytest.approx(expected, rel=0.25)
        if noise and low is not None and high is not None:
            assert low <= ratio <= high
    assert fitted.law.loss(8e5, 16e6) == pytest.approx(TRUE.loss(8e5, 16e6), rel=5e-3)


def test_runs_whose_loss_does_not_depend_on_size_tell_no_ratio() -> None:
    flat = Law(E=0.6, A=0.0, alpha=0.3, B=300.0, beta=0.4)
    sizes, tokens, _ = runs()
    fitted = law.fit(sizes, tokens, [flat.loss(n, d) for n, d in zip(sizes, tokens, strict=True)])
    assert pytest.approx(0, abs=1e-6) == fitted.law.A
    assert fitted.ratios[0][1] is None or not math.isfinite(fitted.ratios[0][1])


def test_too_few_runs() -> None:
    with pytest.raises(UserError, match="too few for a scaling law"):
        law.fit([1e5, 2e5], [1e6, 2e6], [1.0, 0.9])


def test_a_law_is_stored_and_loaded(tmp_path: Path) -> None:
    fitted = law.fit(*runs())
    law.save(tmp_path / "law.json", fitted, about={"recipe": "test"})
    assert law.load(tmp_path / "law.json") == fitted
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="holds no scaling law"):
        law.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="law"):
        law.load(tmp_path / "missing-law.json")


def test_the_planner_takes_the_ratio_of_a_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = law.fit(*runs())
    path = tmp_path / "law.json"
    law.save(path, fitted, about={})
    words = ["plan", "tiny", "--base.tokens", "None", "--base.law", str(path), "--json"]
    assert cli.main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    size = plan["estimates"]["scaling_parameters"]
    expected = fitted.law.best_tokens_per_param(size)
    assert plan["values"]["base.tokens_per_param"] == pytest.approx(expected, abs=0.01)
    assert "law.json" in plan["rules"]["base.tokens_per_param"]


def test_grids() -> None:
    grid = sweep.parse_grid(["model.depth=2,3", "base.matrix_lr=0.01,0.02"])
    made = sweep.points(grid, seeds=2)
    assert len(made) == 8 and len({point.name for point in made}) == 8
    assert made[0].settings == {
        "model.depth": "2",
        "base.matrix_lr": "0.01",
        "base.seed": "0",
    }
    for bad in (["depth=2"], ["model.depth="], ["model.depth=2", "model.depth=3"]):
        with pytest.raises(UserError):
            sweep.parse_grid(bad)


def test_a_wrong_value_is_refused_before_anything_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "tiny", "--out", str(tmp_path / "s"), "--grid", "model.depth=1,many"]
    assert cli.main(words) == 1
    assert "many" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert cli.main(["sweep", "tiny"]) == 1
    assert "a sweep needs a grid" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_real_runs_goes_on_where_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    out = tmp_path / "sweep"
    words = ["sweep", str(recipe), "--out", str(out), "--grid", "base.tokens=1024,2048"]
    assert cli.main(words) == 0
    text = capfd.readouterr().out
    assert "2 of 2 runs are done" in text and "too few for a scaling law" in text
    rows = json.loads((out / "results.json").read_text())
    assert [row["tokens"] for row in rows] == [1024, 2048]
    assert all(row["bpb"] > 1 and row["seconds"] > 0 for row in rows)
    assert cli.main(words) == 0
    assert capfd.readouterr().err.count("done before") == 2
