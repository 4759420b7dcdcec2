"""A grid of small runs and the scaling law that they tell: `fledge sweep`.

Every point of the grid is a whole `fledge run` in a process and a run directory of its own, so a
sweep that was stopped goes on where it was, and a point that is done costs nothing. What comes out
lies beside them: results.json (one row a run), law.json (which `base.law` takes), sweep.md and
sweep.svg. Called by the command line only; it trains nothing itself.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fledge import files, report_plots
from fledge.errors import EXIT_DONE, EXIT_INTERRUPTED, Interrupted, UserError
from fledge.plan import law
from fledge.run import Run

SEED_KEY = "base.seed"
MOST_POINTS = 1000


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    settings: dict[str, str]  # key -> value, the seed among them


@dataclass(frozen=True)
class Result:
    """What a finished run tells."""

    name: str
    settings: dict[str, str]
    parameters: int  # of blocks and head
    tokens: int
    flops: float
    bpb: float
    seconds: float


def parse_grid(words: Iterable[str]) -> dict[str, list[str]]:
    """KEY=A,B,... of every --grid as key -> values. Raises UserError for anything else."""
    grid: dict[str, list[str]] = {}
    for word in words:
        key, _, values = word.partition("=")
        found = [value for value in values.split(",") if value]
        if "." not in key or not found:
            raise UserError(
                f"--grid {word} is no grid",
                "it names a key of the recipe and the values to try",
                "write it as --grid model.depth=2,4,6",
            )
        if key in grid:
            raise UserError(
                f"--grid names {key} twice", "only one can hold", "put all its values into one"
            )
        grid[key] = list(dict.fromkeys(found))
    return grid


def points(grid: dict[str, list[str]], seeds: int) -> list[Point]:
    """Every combination of the grid's values, each with `seeds` seeds from 0."""
    if SEED_KEY not in grid:
        grid = grid | {SEED_KEY: [str(seed) for seed in range(seeds)]}
    made = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = "_".join(f"{key.partition('.')[2]}-{value}" for key, value in settings.items())
        made.append(Point(re.sub(r"[^A-Za-z0-9_.-]", "-", name), settings))
    if len(made) > MOST_POINTS or len({point.name for point in made}) < len(made):
        raise UserError(
            f"the grid has {len(made)} points",
            f"the most is {MOST_POINTS}, and no two may have the same name",
            "give fewer or clearer values",
        )
    return made


def run_points(
    recipe: str, todo: list[Point], out: Path, extra: list[str], tell: Callable[[str], None]
) -> None:
    """Runs what is not finished, one after the other, each up to the end of base.

    Raises Interrupted when a run was stopped, UserError when one failed.
    """
    for number, point in enumerate(todo, start=1):
        shown = " ".join(f"{key}={value}" for key, value in point.settings.items())
        if result_of(out / point.name, point) is not None:
            tell(f"[{number}/{len(todo)}] {shown}: done before")
            continue
        tell(f"[{number}/{len(todo)}] {shown}")
        words = [f"--{key}={value}" for key, value in point.settings.items()]
        command = [sys.executable, "-m", "fledge", "run", recipe, *words, *extra]
        ended = subprocess.run(
            [*command, "--until", "base", "--out", str(out / point.name)], check=False
        ).returncode
        if ended in (EXIT_INTERRUPTED, -2):
            raise Interrupted(f"{number - 1} of {len(todo)} runs are done")
        if ended != EXIT_DONE:
            raise UserError(
                f"the run {point.name} ended with code {ended}",
                "its own message stands above",
                "mend that and run the same sweep again: what is done is kept",
            )


def result_of(folder: Path, point: Point) -> Result | None:
    """What the finished run in `folder` tells; None if it is not finished."""
    if not Run.is_run(folder):
        return None
    run = Run.read(folder)
    stage = run.read_stage("base")
    if stage is None or stage.get("status") != "done":
        return None
    measured = None
    for line in run.metrics_file("base").read_text(encoding="utf-8").splitlines():
        measured = json.loads(line).get("bpb", measured)
    if measured is None:
        return None
    estimates = json.loads(run.resolved_file.read_text(encoding="utf-8"))["estimates"]
    tokens = estimates["stages"]["base"]["tokens"]
    return Result(
        point.name,
        point.settings,
        estimates["scaling_parameters"],
        tokens,
        tokens * estimates["flops_per_token"],
        measured,
        stage["seconds"],
    )


def conclude(recipe: str, todo: list[Point], out: Path) -> str:
    """Writes what the finished runs tell together; returns sweep.md's text."""
    found = [result for p in todo if (result := result_of(out / p.name, p)) is not None]
    files.write_json(out / "results.json", [asdict(result) for result in found])
    lines = [f"# sweep of {recipe}", "", f"{len(found)} of {len(todo)} runs are done.", ""]
    lines += _table(found)
    try:
        fitted = law.fit(
            [float(r.parameters) for r in found],
            [float(r.tokens) for r in found],
            [r.bpb for r in found],
        )
    except UserError as error:
        lines += ["", f"No scaling law: {error.what}; {error.why}."]
    else:
        law.save(out / "law.json", fitted, about={"recipe": recipe, "runs": str(out)})
        lines += ["", *_law_lines(fitted, out)]
        drawn = report_plots.draw(
            "Bits per byte over training compute",
            _curves(found),
            x_label="FLOPs of base, log10",
            y_label="bits per byte",
        )
        if drawn is not None:
            files.write_text(out / "sweep.svg", drawn)
            lines += ["", "![bits per byte over compute](sweep.svg)"]
    text = "\n".join(lines) + "\n"
    files.write_text(out / "sweep.md", text)
    return text


def _groups(found: list[Result]) -> list[tuple[dict[str, str], list[Result]]]:
    """Results of one point of the grid with all their seeds."""
    grouped: dict[str, list[Result]] = {}
    for result in found:
        rest = {k: v for k, v in result.settings.items() if k != SEED_KEY}
        grouped.setdefault(json.dumps(rest), []).append(result)
    return [(json.loads(key), group) for key, group in grouped.items()]


def _table(found: list[Result]) -> list[str]:
    if not found:
        return ["Nothing to compare yet."]
    keys = [key for key in found[0].settings if key != SEED_KEY]
    lines = [
        "| "
        + " | ".join([*keys, "parameters", "tokens", "FLOPs", "seconds", "bpb", "seeds"])
        + " |",
        "| " + " | ".join(["---"] * (len(keys) + 6)) + " |",
    ]
    for settings, group in sorted(_groups(found), key=lambda g: mean(r.bpb for r in g[1])):
        losses = [r.bpb for r in group]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        cells: list[Any] = [
            *(settings[key] for key in keys),
            f"{group[0].parameters:,}",
            f"{group[0].tokens:,}",
            f"{group[0].flops:.2e}",
            f"{mean(r.seconds for r in group):.0f}",
            f"{mean(losses):.4f}{spread}",
            len(group),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, "", "Best first; bpb is the mean over the seeds ± their standard deviation."]


def _law_lines(fitted: law.Fit, out: Path) -> list[str]:
    one = fitted.law
    lines = [
        "## The law",
        "",
        f"bpb = {one.E:.3f} + {one.A:.4g} / N^{one.alpha:.2f} + {one.B:.4g} / D^{one.beta:.2f} "
        f"(N parameters of blocks and head, D tokens), off by {fitted.error:.1%} on average.",
        "",
        "| parameters | best tokens per parameter | 95 % interval |",
        "| --- | --- | --- |",
    ]
    for size, ratio, low, high in fitted.ratios:
        told = "not told by these runs" if ratio is None else f"{ratio:.1f}"
        interval = "-" if low is None or high is None else f"{low:.1f} to {high:.1f}"
        lines.append(f"| {size:,.0f} | {told} | {interval} |")
    return [*lines, "", f"Plan with it: `--base.law {out / 'law.json'}`"]


def _curves(found: list[Result]) -> dict[str, list[tuple[float, float]]]:
    """A line per size: bpb over FLOPs."""
    from math import log10

    curves: dict[str, dict[float, list[float]]] = {}
    for result in found:
        size = f"{result.parameters / 1e6:.2f}M"
        curves.setdefault(size, {}).setdefault(log10(result.flops), []).append(result.bpb)
    return {
        size: sorted((flops, mean(losses)) for flops, losses in at.items())
        for size, at in curves.items()
    }
