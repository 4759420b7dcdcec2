"""Pictures of a run as SVG, the same bytes for the same numbers.

Lines and bars in the colours of Okabe and Ito, which colour-blind people tell apart; lines differ
in dashes and markers too, so that a grey print will do. Every axis has a name and a unit.
matplotlib (the `report` extra) is imported only here and only when a plot is drawn; without it
`draw` returns None and the report says so. Called by `fledge.report`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Points = Sequence[tuple[float, float]]
Bar = tuple[str, float, float, float]  # name, value, low, high

# Okabe and Ito, Color Universal Design (2008), without the yellow that white swallows
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "x")
GREY = "#666666"


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
    from_zero: bool = False,
) -> str | None:
    """One SVG with a line per curve and, if given, a dashed horizontal level with its name."""
    if not can_draw():
        return None
    with _figure(3.2) as (figure, axes):
        for i, (name, points) in enumerate(curves.items()):
            few = len(points) <= 20
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                label=name,
                linewidth=1.5,
                color=COLOURS[i % len(COLOURS)],
                linestyle=DASHES[i % len(DASHES)],
                marker=MARKERS[i % len(MARKERS)] if few else None,
                markersize=4,
            )
        if level is not None:
            axes.axhline(level[0], linestyle=":", linewidth=1.2, color=GREY, label=level[1])
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, alpha=0.3)
        if len(curves) > 1 or level is not None:
            axes.legend(fontsize=9)
        return _svg(figure)


def bars(
    title: str,
    groups: Mapping[str, Sequence[Bar]],
    *,
    x_label: str,
    marks: Mapping[str, float] | None = None,
    mark_label: str = "",
) -> str | None:
    """Horizontal bars with their intervals: a row per name, a colour per group; `marks` are ticks
    (chance, say) by name. A group need not have every name."""
    if not can_draw():
        return None
    names = list(dict.fromkeys(bar[0] for rows in groups.values() for bar in rows))
    places = {name: len(names) - 1 - i for i, name in enumerate(names)}  # the first one on top
    high = 0.8 / max(1, len(groups))
    with _figure(max(1.8, 0.7 + 0.26 * len(names) * max(1.0, 0.55 * len(groups)))) as (
        figure,
        axes,
    ):
        for i, (group, rows) in enumerate(groups.items()):
            shift = (len(groups) - 1) / 2 - i
            below = [max(0.0, value - low) for _, value, low, _ in rows]
            above = [max(0.0, top - value) for _, value, _, top in rows]
            axes.barh(
                [places[name] + shift * high for name, *_ in rows],
                [value for _, value, _, _ in rows],
                height=high * 0.9,
                color=COLOURS[i % len(COLOURS)],
                xerr=[below, above] if any(below + above) else None,
                error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 2},
                label=group,
            )
        known = {name: x for name, x in (marks or {}).items() if name in places}
        if known:
            axes.scatter(
                list(known.values()),
                [places[name] for name in known],
                marker="|",
                s=120,
                color="#000000",
                label=mark_label,
                zorder=3,
            )
        axes.axvline(0, linewidth=0.8, color=GREY)
        axes.set_yticks([places[name] for name in names], names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(x_label)
        axes.grid(visible=True, axis="x", alpha=0.3)
        if len(groups) > 1 or known:
            axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return _svg(figure)


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, Any]]:
    """(figure, axes) of the page's width and `height` inches, drawn without a display."""
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
        figure = Figure(figsize=(7.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _svg(figure: Any) -> str:
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
