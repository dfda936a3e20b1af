"""The plot of how cost grows: every curve on logarithmic axes, with the fitted slope and the expected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.plot_units import duration_text, duration_ticks, size_text, size_ticks, thin, tick_text
from benchmarks.slopes import LAWS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEASURED, _EXPECTED = "#0072B2", "#E69F00"
_ROWS = {
    "prefill_ms": "time to the first token",
    "decode_ms": "time of a decode step",
    "swap_us": "time to switch tasks",
    "memory_bytes": "memory",
}
_COLUMNS = {
    "tasks": "tasks in memory",
    "rank": "rank of the adapter",
    "sequence": "tokens in the prompt",
    "batch": "rows in the batch",
}
_UNITS = {"prefill_ms": 1e-3, "decode_ms": 1e-3, "swap_us": 1e-6, "memory_bytes": 1.0}


def growth_figure(report: Mapping[str, Any]) -> Figure:
    """A panel for each figure and each number that grows."""
    from matplotlib import pyplot

    growth = report["growth"]
    figure: Figure
    figure, grid = pyplot.subplots(
        len(_ROWS), len(growth), figsize=(3.1 * len(growth), 9.6), squeeze=False, layout="constrained"
    )
    figure.suptitle("How cost grows, on logarithmic axes: slope 0 is constant, slope 1 is proportional", fontsize=12)
    for column, (series, curves) in enumerate(growth.items()):
        for row, name in enumerate(LAWS[series]):
            axes = grid[row][column]
            points = {float(x): _UNITS[name] * point[name] for x, point in curves["points"].items() if point[name] > 0}
            drawn = _draw_curve(axes, points, curves["fits"][name])
            _scale(axes, sorted(points), drawn, name)
            if column == 0:
                axes.set_ylabel(_ROWS[name], fontsize=9)
            if row == len(_ROWS) - 1:
                axes.set_xlabel(_COLUMNS[series], fontsize=9)
    lines = [
        grid[0][0].plot([], [], style, color=colour)[0] for style, colour in (("o-", _MEASURED), ("--", _EXPECTED))
    ]
    figure.legend(lines, ["measured", "slope that is expected"], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_curve(axes: Axes, points: Mapping[float, float], fit: Mapping[str, Any]) -> list[float]:
    """Draw the points and a line of the expected slope through the first that it holds for; what was drawn, in y."""
    axes.plot(list(points), list(points.values()), "o-", color=_MEASURED, markersize=4)
    fitted = [x for x in points if x >= fit["from"]]
    if fit["expected"] is None or not fitted:
        return list(points.values())
    start = points[fitted[0]]
    line = [start * (x / fitted[0]) ** fit["expected"] for x in fitted]
    axes.plot(fitted, line, "--", color=_EXPECTED, linewidth=2)
    axes.set_title(f"slope {_slope_text(fit['fitted'])}, expected {_slope_text(fit['expected'])}", fontsize=9)
    return [*points.values(), *line]


def _scale(axes: Axes, xs: Sequence[float], ys: Sequence[float], name: str) -> None:
    """Logarithmic axes that hold every line, with ticks in units that people read."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if not xs:
        return
    low, high = min(ys), max(ys)
    # A flat curve must look flat: at least two decades are shown.
    middle, half = (low * high) ** 0.5, max((high / low) ** 0.5 * 1.3, 10)
    low, high = middle / half, middle * half
    axes.set_ylim(low, high)
    text: Callable[[float], str]
    text, ticks = (size_text, size_ticks) if name == "memory_bytes" else (duration_text, duration_ticks)
    chosen = thin(ticks(low, high), 5)
    axes.set_yticks(chosen, [tick_text(text(tick)) for tick in chosen], fontsize=7)
    axes.set_yticks([], minor=True)
    shown = thin(xs, 5)
    axes.set_xticks(shown, [f"{x:,.0f}" for x in shown], fontsize=7)
    axes.set_xticks([], minor=True)


def _slope_text(slope: float) -> str:
    return f"{slope + 0.0:.2f}".replace("-0.00", "0.00")
