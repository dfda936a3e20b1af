"""The plots of a measured run: python -m benchmarks.plots [REPORT]. Colours are Okabe and Ito's, safe for all eyes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.ratios import adapter_cost
from benchmarks.slopes import LAWS

KIT_COLOUR, PEER_COLOUR, LIMIT_COLOUR = "#0072B2", "#E69F00", "#D55E00"
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "os^Dv<>"
TASK_COUNTS = (1, 10, 100, 1000, 10000)
UNITS = {
    "prefill_ms": "first token, ms",
    "decode_ms": "a decode step, ms",
    "swap_us": "swap, µs",
    "memory_bytes": "memory, MB",
}
AXES = {"tasks": "tasks", "rank": "rank", "sequence": "tokens in the prompt", "batch": "rows in the batch"}


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot that the report has figures for; paths of the files."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_speed(report, folder), _cost(report, folder), _swap(report, folder), _memory(report, folder)]
    if report.get("growth"):
        drawn.append(_growth(report["growth"], folder))
    return drawn


def _speed(report: Mapping[str, Any], folder: Path) -> Path:
    """Tokens/s of every case, and the limit of the memory."""
    cases = _measured(report, "decode_tok_s")
    limit = report["memory_gb_s"] * 1e9
    values = [case["decode_tok_s"] for case in cases.values()]
    figure, axes = _bars(cases, values, "{:.0f}")
    for place, case in enumerate(cases.values()):
        axes.plot([limit / case["weight_bytes"]] * 2, [place - 0.4, place + 0.4], color=LIMIT_COLOUR, linewidth=2)
    axes.plot([], [], color=LIMIT_COLOUR, linewidth=2, label="limit of the memory's bandwidth")
    axes.set_xlabel("tokens/s")
    _legend_above(axes)
    return _save(figure, folder / "tokens-per-second.png")


def _cost(report: Mapping[str, Any], folder: Path) -> Path:
    """What an active adapter costs in tokens/s."""
    cases = _measured(report, "decode_tok_s")
    costs = {name: adapter_cost(cases, name) for name in cases}
    cases = {name: case for name, case in cases.items() if costs[name] is not None}
    figure, axes = _bars(cases, [100 * costs[name] for name in cases], "{:.1f} %")  # type: ignore[operator]
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("tokens/s lost with an adapter active, % of the same engine without")
    return _save(figure, folder / "adapter-cost.png")


def _swap(report: Mapping[str, Any], folder: Path) -> Path:
    """The call that swaps, and bringing an adapter from the disk."""
    cases = _measured(report, "swap_us")
    figure, axes = _bars(cases, [1e3 * case["adapter_load_ms"] for case in cases.values()], "{:,.0f} µs")
    swaps = [case["swap_us"] for case in cases.values()]
    axes.plot(swaps, range(len(swaps)), "D", color=LIMIT_COLOUR, label="swap to a loaded adapter")
    axes.plot([], [], "s", color=PEER_COLOUR, label="load an adapter from the disk (bars)")
    axes.set_xscale("log")
    axes.set_xlabel("µs (log scale)")
    axes.set_xlim(right=50 * axes.dataLim.x1)
    _legend_above(axes)
    return _save(figure, folder / "swap.png")


def _memory(report: Mapping[str, Any], folder: Path) -> Path:
    """Resident memory for N tasks: engine and adapters as measured, and the kit's own measured counts."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for place, (name, case) in enumerate(_measured(report, "adapter_resident_bytes").items()):
        each = case["adapter_resident_bytes"] / 2**20
        values = [case["resident_mb"] + (count - 1) * each for count in TASK_COUNTS]
        style: dict[str, Any] = {"color": LINES[1 + place % 6]}
        if name.startswith("kit"):
            style = {"color": KIT_COLOUR, "linewidth": 2.5}
        axes.plot(TASK_COUNTS, values, marker=MARKERS[place % len(MARKERS)], label=case["label"], **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tasks in memory")
    axes.set_ylabel("resident memory, MB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _save(figure, folder / "memory.png")


def _growth(growth: Mapping[str, Any], folder: Path) -> Path:
    """Every curve on log-log axes, with the fitted slope and the expected one."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(UNITS), len(growth), figsize=(3 * len(growth), 9), squeeze=False)
    for column, (series, found) in enumerate(growth.items()):
        for row, name in enumerate(LAWS[series]):
            axes = grid[row][column]
            scale = 2**20 if name == "memory_bytes" else 1
            points = {float(x): point[name] / scale for x, point in found["points"].items() if point[name] > 0}
            fit = found["fits"][name]
            if points:
                axes.plot(list(points), list(points.values()), "o-", color=KIT_COLOUR, markersize=4)
            fitted_xs = [x for x in points if x >= fit["from"]]
            if fit["expected"] is not None and fitted_xs:
                start = points[fitted_xs[0]]
                line = [start * (x / fitted_xs[0]) ** fit["expected"] for x in fitted_xs]
                axes.plot(fitted_xs, line, "--", color=PEER_COLOUR, linewidth=2)
                axes.set_title(f"slope {fit['fitted']:.2f}, expected {fit['expected']:.2f}", fontsize=9)
            axes.set_xscale("log")
            axes.set_yscale("log")
            if points:
                low, high = min(points.values()), max(points.values())
                # A flat curve must look flat: at least two decades are shown.
                middle, half = (low * high) ** 0.5, max((high / low) ** 0.5 * 1.3, 10)
                axes.set_ylim(middle / half, middle * half)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=7)
            if column == 0:
                axes.set_ylabel(UNITS[name], fontsize=9)
            if row == len(UNITS) - 1:
                axes.set_xlabel(AXES[series], fontsize=9)
    return _save(figure, folder / "growth.png")


def _measured(report: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {name: case for name, case in report["peers"].items() if case.get(field) is not None}


def _bars(cases: Mapping[str, Any], values: list[float], form: str) -> tuple[Any, Any]:
    """Horizontal bars, the first case on top."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.32 * len(cases)))
    colours = [KIT_COLOUR if name.startswith("kit") else PEER_COLOUR for name in cases]
    bars = axes.barh(range(len(cases)), values, color=colours)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(cases)), [case["label"] for case in cases.values()], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _legend_above(axes: Any) -> None:
    """Where it covers no bar."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def main() -> None:
    """Draw the plots of a stored report beside it."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/cpu.json")
    for drawn in draw(json.loads(path.read_text(encoding="utf-8")), path.parent):
        print(drawn)


if __name__ == "__main__":
    main()
