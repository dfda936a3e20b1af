"""The plots of a measured run: python -m benchmarks.plots [REPORT]. Colours are Okabe and Ito's, safe for all eyes.

Engines in float32 and in 4 bits have separate panels. Each figure has a title and its unit.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import CASES
from benchmarks.plot_growth import growth_figure
from benchmarks.plot_units import duration_text, duration_ticks, size_text, size_ticks, spread, tick_text
from benchmarks.ratios import adapter_cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIT_COLOUR, PEER_COLOUR, LIMIT_COLOUR = "#0072B2", "#E69F00", "#D55E00"
LINES = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "s^Dv<>"
TASK_COUNTS = (1, 10, 100, 1000, 10000)
PRECISIONS = {"fp32": "float32", "int4": "4 bit"}
Cases = dict[str, Any]
_LABELS = {case.name: case.label for case in CASES}


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every plot of the report, where it has the figures; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, make in FIGURES.items():
        if name == "growth" and not report.get("growth"):
            continue
        figure = make(report)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return paths


def speed_figure(report: Mapping[str, Any]) -> Figure:
    """Tokens/s of every case, and the limit of the memory's bandwidth."""
    limit = report["memory_gb_s"] * 1e9
    figure, panels = _panels(_measured(report, "decode_tok_s"), f"Generation speed, {_model(report)}")
    for axes, cases in panels:
        _bars(axes, cases, [case["decode_tok_s"] for case in cases.values()], "{:.0f}", inside=True)
        for place, case in enumerate(cases.values()):
            limits = [limit / case["weight_bytes"]] * 2
            axes.plot(limits, [place - 0.4, place + 0.4], color=LIMIT_COLOUR, linewidth=2.5)
        axes.set_xlim(left=0, right=1.08 * max(limit / case["weight_bytes"] for case in cases.values()))
    panels[-1][0].set_xlabel("tokens per second (more is better)")
    line = panels[0][0].plot([], [], color=LIMIT_COLOUR, linewidth=2.5)[0]
    _legend_below(figure, [line], ["limit: every weight read once a token at the memory's bandwidth"])
    return figure


def cost_figure(report: Mapping[str, Any]) -> Figure:
    """What an active adapter costs in tokens/s."""
    cases = _measured(report, "decode_tok_s")
    costs = {name: cost for name in cases if (cost := adapter_cost(cases, name)) is not None}
    title = f"Speed lost to an active adapter, {_model(report)}"
    figure, panels = _panels({name: cases[name] for name in costs}, title, sharex=True)
    for axes, cases_of in panels:
        _bars(axes, cases_of, [100 * costs[name] for name in cases_of], "{:.1f} %")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.margins(x=0.15)
    panels[-1][0].set_xlabel("tokens per second lost, % of the same engine without an adapter (less is better)")
    return figure


def switch_figure(report: Mapping[str, Any]) -> Figure:
    """Switching to a loaded adapter, and bringing one from the disk."""
    title = f"Switching tasks and loading an adapter, {_model(report)}"
    figure, panels = _panels(_measured(report, "swap_us"), title, sharex=True)
    handles: dict[str, Any] = {}
    sides: dict[str, tuple[str, str, Callable[[Mapping[str, Any]], float]]] = {
        "switch to a loaded adapter": ("D", LIMIT_COLOUR, lambda case: 1e-6 * float(case["swap_us"])),
        "load an adapter from the disk": ("o", KIT_COLOUR, lambda case: 1e-3 * float(case["adapter_load_ms"])),
    }
    for axes, cases in panels:
        _name_rows(axes, cases)
        for place, case in enumerate(cases.values()):
            seconds = {label: read(case) for label, (_, _, read) in sides.items()}
            axes.plot(list(seconds.values()), [place] * 2, color="#999999", linewidth=1, zorder=1)
            for label, (marker, colour, _) in sides.items():
                handles[label] = axes.plot(seconds[label], place, marker, color=colour, linestyle="none")[0]
                is_left = seconds[label] == min(seconds.values())
                axes.annotate(
                    duration_text(seconds[label]), (seconds[label], place), xytext=(-7 if is_left else 7, 0),
                    textcoords="offset points", ha="right" if is_left else "left", va="center", fontsize=8,
                )  # fmt: skip
        axes.set_xscale("log")
    low, high = panels[0][0].dataLim.x0, max(axes.dataLim.x1 for axes, _ in panels)
    low = min(low, *(axes.dataLim.x0 for axes, _ in panels)) / 40
    for axes, _ in panels:
        axes.set_xlim(low, high * 40)
        ticks = duration_ticks(low, high * 40)
        axes.set_xticks(ticks, [tick_text(duration_text(tick)) for tick in ticks], fontsize=8)
        axes.set_xticks([], minor=True)
    panels[-1][0].set_xlabel("time, logarithmic (less is better)")
    _legend_below(figure, list(handles.values()), list(handles))
    return figure


def memory_figure(report: Mapping[str, Any]) -> Figure:
    """Resident memory for N tasks: of one task as measured, of more with the measured size of a further adapter."""
    from matplotlib import pyplot

    groups = _by_precision(_measured(report, "adapter_resident_bytes"))
    figure: Figure
    figure, grid = pyplot.subplots(
        len(groups), 1, figsize=(8, 1.4 + 2.9 * len(groups)), sharex=True, sharey=True, squeeze=False
    )
    for axes, (precision, cases) in zip(grid[:, 0], groups.items(), strict=True):
        for place, (name, case) in enumerate(cases.items()):
            sizes = [task_memory(case, count) for count in TASK_COUNTS]
            is_kit = name.startswith("kit")
            axes.plot(
                TASK_COUNTS, sizes, color=KIT_COLOUR if is_kit else LINES[place % len(LINES)],
                linewidth=3 if is_kit else 1.5, marker="o" if is_kit else MARKERS[place % len(MARKERS)], markersize=5,
            )  # fmt: skip
        axes.set_title(PRECISIONS.get(precision, precision), loc="left", fontsize=10)
        axes.set_ylabel("resident memory")
        axes.grid(alpha=0.3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = size_ticks(low, high)
    axes.set_yticks(ticks, [tick_text(size_text(tick)) for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xticks(TASK_COUNTS, [f"{count:,}" for count in TASK_COUNTS])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tasks in memory")
    figure.suptitle(f"Memory for many tasks, {_model(report)}", x=0.02, ha="left", fontsize=12)
    note = "One task is measured; each further task adds the measured size of one adapter."
    figure.text(0.02, 0.012, note, fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 0.65, 1))
    for axes, cases in zip(grid[:, 0], groups.values(), strict=True):
        _label_ends(axes, cases)
    return figure


def task_memory(case: Mapping[str, Any], count: int) -> float:
    """Bytes that a case takes with ``count`` tasks in memory."""
    return float(case["resident_mb"] * 2**20 + (count - 1) * case["adapter_resident_bytes"])


FIGURES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "tokens-per-second": speed_figure,
    "adapter-cost": cost_figure,
    "swap": switch_figure,
    "memory": memory_figure,
    "growth": growth_figure,
}


def _model(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    # A GGUF file's quantisation is left out: its weights run in float32, unless a panel says otherwise.
    name = re.sub(r"(\.I?Q\d\w*)?\.gguf$", "", str(settings["model"]))
    return f"{name}, {settings['threads']} CPU threads"


def _measured(report: Mapping[str, Any], field: str) -> Cases:
    return {name: case for name, case in report["peers"].items() if case.get(field) is not None}


def _by_precision(cases: Cases) -> dict[str, Cases]:
    groups: dict[str, Cases] = {}
    for name, case in cases.items():
        groups.setdefault(case["precision"], {})[name] = case
    return groups


def _panels(cases: Cases, title: str, sharex: bool = False) -> tuple[Figure, list[tuple[Axes, Cases]]]:
    """A figure with a panel for each precision, as high as it has cases."""
    from matplotlib import pyplot

    groups = _by_precision(cases)
    figure: Figure
    figure, grid = pyplot.subplots(
        len(groups), 1, figsize=(8, 1.5 + 0.45 * len(groups) + 0.3 * len(cases)), sharex=sharex, squeeze=False,
        height_ratios=[len(group) + 0.6 for group in groups.values()], layout="constrained",
    )  # fmt: skip
    figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    for axes, precision in zip(grid[:, 0], groups, strict=True):
        axes.set_title(PRECISIONS.get(precision, precision), loc="left", fontsize=10)
    return figure, list(zip(grid[:, 0], groups.values(), strict=True))


def _bars(axes: Axes, cases: Cases, values: Sequence[float], form: str, inside: bool = False) -> None:
    """Horizontal bars with their values, the first case on top."""
    colours = [KIT_COLOUR if name.startswith("kit") else PEER_COLOUR for name in cases]
    bars = axes.barh(range(len(cases)), values, color=colours)
    texts = axes.bar_label(bars, [form.format(value) for value in values], padding=-4 if inside else 3, fontsize=8)
    for text, colour in zip(texts, colours, strict=True):
        if inside:
            text.set(ha="right", color="white" if colour == KIT_COLOUR else "black")
    _name_rows(axes, cases)


def _name_rows(axes: Axes, cases: Cases) -> None:
    axes.set_yticks(range(len(cases)), [_short_label(name, case) for name, case in cases.items()], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _short_label(name: str, case: Mapping[str, Any]) -> str:
    """A case's label as it is called today, without its precision, which the panel's title says."""
    return str(_LABELS.get(name, case["label"])).replace(" int4", "")


def _label_ends(axes: Axes, cases: Cases) -> None:
    """Name each line beside its end, with its memory there; names that would overlap move apart."""
    figure = axes.figure
    transform = axes.transData
    ends = [task_memory(case, TASK_COUNTS[-1]) for case in cases.values()]
    heights = [transform.transform((TASK_COUNTS[-1], end))[1] for end in ends]
    per_point = figure.dpi / 72
    for line, (name, case), end, height, moved in zip(
        axes.get_lines(), cases.items(), ends, heights, spread(heights, 11.5 * per_point), strict=True
    ):
        axes.annotate(
            f"{_short_label(name, case)}: {size_text(end)}", (TASK_COUNTS[-1], end),
            xytext=(22, (moved - height) / per_point), textcoords="offset points", annotation_clip=False,
            va="center", fontsize=8, fontweight="bold" if line.get_color() == KIT_COLOUR else "normal",
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Where it covers nothing."""
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=8, frameon=False)


def main() -> None:
    """Draw the plots of a stored report beside it."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/cpu.json")
    for drawn in draw(json.loads(path.read_text(encoding="utf-8")), path.parent):
        print(drawn)


if __name__ == "__main__":
    main()
