"""The scaling law of a machine's own runs: loss from parameters and tokens, and the best ratio.

L(N, D) = E + A / N^alpha + B / D^beta, and what follows from it for the ratio of tokens to
parameters at a given compute of 6 N D FLOPs (Hoffmann et al. 2022, arXiv:2203.15556, approach 3).
`fit` is called by `fledge sweep`, which stores the law; the planner reads it for `base.law`.
Numpy only; it runs nothing and knows no run directory.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fledge import files
from fledge.errors import UserError

LEAST_POINTS = 5  # distinct (N, D): the law has five numbers
_EXPONENTS = np.linspace(0.05, 1.25, 25)
_DRAWS = 200  # of the bootstrap
_SUBSETS = [s for n in (3, 2, 1) for s in itertools.combinations(range(3), n)]


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in bits per byte; N counts blocks and head."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted bits per byte."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def best_tokens_per_param(self, parameters: float) -> float | None:
        """Tokens per parameter at which this size is the best use of its compute.

        None where the runs do not tell: the loss did not fall with size, or not with tokens.
        """
        if self.A <= 0 or self.B <= 0:
            return None
        # the minimum of L on N D = C / 6 lies where alpha A / N^alpha = beta B / D^beta
        tokens = (self.beta * self.B * parameters**self.alpha / (self.alpha * self.A)) ** (
            1 / self.beta
        )
        return tokens / parameters


@dataclass(frozen=True)
class Fit:
    """A law, the 95 % intervals of what follows from it, and what it was fitted to."""

    law: Law
    parameters: tuple[float, float]  # least and most of the runs
    tokens: tuple[float, float]
    runs: int
    error: float  # root mean square of the relative errors
    ratios: list[tuple[float, float | None, float | None, float | None]]  # N, best D/N, low, high


def fit(parameters: list[float], tokens: list[float], losses: list[float]) -> Fit:
    """The law that fits runs best in relative error; intervals by drawing the runs anew.

    Raises UserError when there are too few different runs to tell five numbers.
    """
    n, d, y = (np.asarray(x, dtype=np.float64) for x in (parameters, tokens, losses))
    distinct = len({*zip(n.tolist(), d.tolist(), strict=True)})
    if distinct < LEAST_POINTS or len({*n.tolist()}) < 2 or len({*d.tolist()}) < 2:
        raise UserError(
            f"{distinct} different runs are too few for a scaling law",
            f"it has five numbers: it takes {LEAST_POINTS} pairs of size and tokens, two of each",
            "add values to the grid, for example --grid model.depth=2,3,4 "
            "--grid base.tokens_per_param=5,10,20",
        )
    best = _solve(n, d, y, np.ones(len(y)))
    rng = np.random.default_rng(0)
    drawn = [
        _solve(n, d, y, np.bincount(rng.integers(0, len(y), len(y)), minlength=len(y)))
        for _ in range(_DRAWS)
    ]
    ratios = []
    for size in sorted({*n.tolist()}):
        found = [law.best_tokens_per_param(size) for law in drawn]
        known = [r for r in found if r is not None]
        enough = len(known) >= 0.975 * len(found)  # else the runs do not bound it
        low, high = np.percentile(known, [2.5, 97.5]).tolist() if enough else (None, None)
        ratios.append((size, best.best_tokens_per_param(size), low, high))
    predicted = np.array([best.loss(a, b) for a, b in zip(n, d, strict=True)])
    error = float(np.sqrt(np.mean((predicted / y - 1) ** 2)))
    return Fit(
        best,
        (float(n.min()), float(n.max())),
        (float(d.min()), float(d.max())),
        len(y),
        error,
        ratios,
    )


def _solve(n: np.ndarray, d: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Law:
    """Least squares of relative errors with E, A, B >= 0, exponents by search over a grid.

    For given exponents the law is linear in E, A, B: three numbers, so every subset of them that
    may be positive is solved, and the best one with no negative number is taken.
    """
    # scaled to the middle run, so that the normal equations are well conditioned
    middle_n, middle_d = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
    size, count = np.meshgrid(_EXPONENTS, _EXPONENTS, indexing="ij")
    size, count = size.ravel()[:, None], count.ravel()[:, None]
    features = np.stack(
        [
            np.ones((len(size), len(n))),
            (n / middle_n) ** -size,
            (d / middle_d) ** -count,
        ],
        axis=1,
    )  # [pairs of exponents, 3, runs]
    scaled = features / y
    gram = np.einsum("gir,gjr,r->gij", scaled, scaled, weights)
    right = np.einsum("gir,r->gi", scaled, weights)
    best_cost, best = math.inf, (0, np.zeros(3))
    for subset in _SUBSETS:
        index = list(subset)
        part = gram[:, index][:, :, index] + 1e-12 * np.eye(len(index))
        solved = np.linalg.solve(part, right[:, index, None])[..., 0]
        full = np.zeros((len(solved), 3))
        full[:, index] = solved
        errors = np.einsum("gi,gir->gr", full, scaled) - 1
        cost = np.where((full >= 0).all(axis=1), (errors**2 * weights).sum(axis=1), math.inf)
        place = int(cost.argmin())
        # a larger subset must be better by more than rounding
        if cost[place] < best_cost * (1 - 1e-9):
            best_cost, best = float(cost[place]), (place, full[place])
    place, (e, a, b) = best
    alpha, beta = float(size[place, 0]), float(count[place, 0])
    return Law(float(e), float(a * middle_n**alpha), alpha, float(b * middle_d**beta), beta)


def save(path: Path, fitted: Fit, *, about: dict[str, str]) -> None:
    """Writes a law for `load`; `about` says where it comes from."""
    files.write_json(path, {"about": about, **asdict(fitted)})


def load(path: str | Path) -> Fit:
    """A stored law. Raises UserError if the file is none."""
    fix = "write one with `fledge sweep`"
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}", "base.law names a stored law", fix)
    row = files.read_json(Path(path), fix=fix)
    try:
        return Fit(
            Law(**row["law"]),
            tuple(row["parameters"]),
            tuple(row["tokens"]),
            row["runs"],
            row["error"],
            [tuple(r) for r in row["ratios"]],
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} holds no scaling law", "its keys are others", fix) from None
