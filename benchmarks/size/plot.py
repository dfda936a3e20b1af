"""The plot of sizes: accuracy of the example tasks against what ships, a panel a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plot_units import spread
from benchmarks.plots import KIT_COLOUR, LIMIT_COLOUR, PEER_COLOUR
from benchmarks.size.cases import SMOLLM2

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Marker, colour and name of each engine, by the first word of a case's name.
_ENGINES = {
    "kit": ("o", KIT_COLOUR, "AdaLink Kit"),
    "llama": ("s", LIMIT_COLOUR, "llama.cpp"),
    "genai": ("^", PEER_COLOUR, "onnxruntime-genai"),
}
_TICKS_MB = (50, 80, 100, 150, 200, 300, 400, 600, 800)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw it on a white ground of its own, which is legible on a dark page as well."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {name: case for name, case in report[SMOLLM2]["cases"].items() if case.get("accuracy")}
    tasks = list(next(iter(cases.values()))["accuracy"]["tasks"])
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(10, 4.6), layout="constrained", squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        _panel(axes, cases, task)
    panels[0][0].set_ylabel("exact match, % (more is better)")
    handles = [
        panels[0][0].plot([], [], marker, color=colour, label=label)[0]
        for engine, (marker, colour, label) in _ENGINES.items()
        if any(_engine(name) == engine for name in cases)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle("Size against accuracy, SmolLM2-135M with its example tasks", fontsize=11)
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def _panel(axes: Axes, cases: Mapping[str, Any], task: str) -> None:
    sizes = [case["shipped_bytes"] / 1e6 for case in cases.values()]
    rates = [100 * case["accuracy"]["tasks"][task]["right"] for case in cases.values()]
    for name, size, rate in zip(cases, sizes, rates, strict=True):
        marker, colour, _ = _ENGINES[_engine(name)]
        axes.plot(size, rate, marker, color=colour, markersize=8)
    low, high = 0.85 * min(sizes), 1.5 * max(sizes)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in _TICKS_MB if low < tick < high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.margins(y=0.15)
    _label(axes, [case["label"].partition(", ")[2] for case in cases.values()], sizes, rates)
    axes.set_title(
        f"{task}, {next(iter(cases.values()))['accuracy']['tasks'][task]['rows']:,} rows", loc="left", fontsize=10
    )
    axes.set_xlabel("shipped, MB, logarithmic (less is better)")
    axes.grid(alpha=0.3)


def _label(axes: Axes, labels: Sequence[str], sizes: Sequence[float], rates: Sequence[float]) -> None:
    """Name each point in a column in the widest gap between sizes, with a line to it; names that would overlap part."""
    ordered = sorted(sizes)
    column = 1.12 * max(pairwise(ordered), key=lambda pair: pair[1] / pair[0], default=ordered)[0]
    low, high = axes.get_ylim()
    for label, size, rate, height in zip(labels, sizes, rates, spread(rates, 0.05 * (high - low)), strict=True):
        axes.annotate(
            label, (size, rate), xytext=(column, height), fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5},
        )  # fmt: skip


def _engine(name: str) -> str:
    return name.partition("-")[0]
