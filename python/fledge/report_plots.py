"""Curves of a run as SVG, the same bytes for the same numbers.

matplotlib (the `report` extra) is imported only here and only when a plot is drawn; without it
`draw` returns None and the report says so. Called by `fledge.report`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]


def can_draw() -> bool:
    """True if matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(
    title: str,
    curves: Mapping[str, Points],
    *,
    x_label: str = "step",
    y_label: str = "",
    level: tuple[float, str] | None = None,
) -> str | None:
    """One SVG with a line per curve and, if given, a dashed horizontal level with its name."""
    if not can_draw():
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": "fledge",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, points in curves.items():
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=name,
                linewidth=1.4,
                marker="o" if len(points) <= 20 else None,
                markersize=3,
            )
        if level is not None:
            axes.axhline(level[0], linestyle="--", linewidth=1, color="#666666", label=level[1])
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, alpha=0.3)
        if len(curves) > 1 or level is not None:
            axes.legend(fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "fledge"})
    return out.getvalue()


def thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of equal stretches, so that long runs stay small files."""
    if len(points) <= most:
        return list(points)
    result = []
    for i in range(most):
        stretch = points[i * len(points) // most : (i + 1) * len(points) // most]
        result.append((stretch[-1][0], sum(y for _, y in stretch) / len(stretch)))
    return result
