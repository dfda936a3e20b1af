"""The plots of a study as PNG. The colours are colour-blind-safe (Okabe and Ito)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import WriteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
# Families of methods with their colours, and the kinds that belong to each.
_FAMILIES = {"AdaLink": "#0072B2", "LoRA": "#E69F00", "soft prompt": "#009E73", "full fine-tuning": "#CC79A7"}
_FAMILY_OF = {
    "adalink": "AdaLink",
    "lora": "LoRA",
    "prompt-tuning": "soft prompt",
    "p-tuning": "soft prompt",
    "full": "full fine-tuning",
}
_INTERVALS = "dot: mean over seeds; bar: 95 % interval (Student's t); triangle: the interval is cut here"
_MARKERS = "os^Dv<>pX*"
_COLUMNS = 2
Cell = Mapping[str, Any]


def draw(summary: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every plot that a summary has figures for: a panel for each base and data set.

    ``differences.png``, ``parameters.png`` and ``time.png`` show the largest training size. The differences are from
    the method that the study compares all others with. ``rank.png`` shows AdaLink where it has several ranks,
    ``size.png`` every trained method with several sizes. Combined data sets are in the tables alone.

    Returns:
        The files by what they show.

    Raises:
        WriteError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    measured = [cell for cell in summary["cells"] if cell["accuracy"] is not None and "parts" not in cell]
    trained = [cell for cell in measured if cell["trained_parameters"]]
    zero_shot = [cell for cell in measured if not cell["trained_parameters"]]
    most = max((cell["size"] for cell in trained), key=_size, default=None)
    largest = [cell for cell in trained if cell["size"] == most]
    adalink = [cell for cell in largest if cell["settings"]["kind"] == "adalink"]
    plots: list[tuple[str, str, Callable[[Cell], float], Callable[[Cell], str], list[Cell]]] = [
        ("parameters", "trained parameters", lambda cell: float(cell["trained_parameters"]), _family, largest),
        ("time", "seconds of training", lambda cell: max(1e-2, float(cell["train_seconds"])), _method, largest),
        ("rank", "rank of AdaLink", lambda cell: float(cell["settings"]["rank"]), _variant, adalink),
        ("size", "training rows", lambda cell: float(cell["train_rows"]), _method, _swept(trained)),
    ]
    pairs = [
        pair
        for pair in summary["comparisons"]
        if pair["size"] == most
        and pair["against"] == summary["study"]["compare_to"]
        and any(_panel(pair) == _panel(cell) for cell in largest)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("differences", *(plot[0] for plot in plots)):
            (folder / f"{name}.png").unlink(missing_ok=True)  # an older one may speak of cells that are gone
        drawn = {}
        if pairs:
            title = f"Accuracy minus that of {pairs[0]['against']}"
            families = {cell["method"]: _FAMILY_OF[cell["settings"]["kind"]] for cell in largest}
            drawn[title] = _draw_differences(folder / "differences.png", title, pairs, families)
        for name, axis, value, series, cells in plots:
            if cells and (name in ("parameters", "time") or len({value(cell) for cell in cells}) > 1):
                path = folder / f"{name}.png"
                drawn[f"Accuracy against {axis}"] = _draw_accuracy(path, axis, value, series, cells, zero_shot)
    except OSError as error:
        raise WriteError(f"plots: cannot write {folder}: {error.strerror}; choose a writable --out") from error
    return drawn


def _draw_differences(path: Path, title: str, pairs: Sequence[Mapping[str, Any]], families: Mapping[str, str]) -> Path:
    """Mean difference of each method and its interval, a row each; a triangle marks an interval that is cut."""
    panels = list(dict.fromkeys(_panel(pair) for pair in pairs))
    names = dict.fromkeys(pair["method"] for pair in pairs)
    methods = [name for family in _FAMILIES for name in names if families[name] == family][::-1]
    figure, grid = _grid(len(panels), 1.2 + 0.24 * len(methods), heading=0.7, share_y=True)
    reach = 1.5 * max(1.0, *(abs(100 * pair["mean"]) for pair in pairs))
    for axes, panel in zip(grid, panels, strict=True):
        axes.axvline(0.0, color="grey", linestyle=":")
        for family in _FAMILIES:
            shown = [pair for pair in pairs if _panel(pair) == panel and families[pair["method"]] == family]
            if shown:
                _draw_family(axes, family, [(methods.index(pair["method"]), pair) for pair in shown], reach)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel(f"percentage points above {pairs[0]['against']}")
        axes.set_title(", ".join(panel), fontsize=10)
    figure.suptitle(f"{title}, percentage points\n{_INTERVALS}", x=0.02, ha="left", fontsize=11)
    _add_legend(figure)
    return _save(figure, path)


def _draw_family(axes: Axes, family: str, rows: Sequence[tuple[int, Mapping[str, Any]]], reach: float) -> None:
    """The methods of one family, each at its row; a panel shows differences of at most ``reach`` points."""
    means = [100 * pair["mean"] for _, pair in rows]
    ends = [[100 * end for end in pair["interval"] or (pair["mean"], pair["mean"])] for _, pair in rows]
    axes.errorbar(
        means, [row for row, _ in rows],
        xerr=[[mean - low for mean, (low, _) in zip(means, ends, strict=True)],
              [high - mean for mean, (_, high) in zip(means, ends, strict=True)]],
        label=family, color=_FAMILIES[family], marker="o", linestyle="none", capsize=3,
    )  # fmt: skip
    for side, marker in ((-1, "<"), (1, ">")):
        cut = [row for (row, _), (low, high) in zip(rows, ends, strict=True) if max(side * low, side * high) > reach]
        if cut:
            axes.plot(
                [side * reach] * len(cut), cut, marker, color=_FAMILIES[family], clip_on=False, label=f"_cut {marker}"
            )


def _draw_accuracy(
    path: Path,
    axis: str,
    value: Callable[[Cell], float],
    series: Callable[[Cell], str],
    cells: Sequence[Cell],
    zero_shot: Sequence[Cell],
) -> Path:
    """Accuracy against ``value``."""
    panels = list(dict.fromkeys(_panel(cell) for cell in cells))
    names = list(dict.fromkeys(series(cell) for cell in cells))
    figure, grid = _grid(len(panels), 3.2)
    for axes, panel in zip(grid, panels, strict=True):
        for index, name in enumerate(names):
            line = [cell for cell in cells if _panel(cell) == panel and series(cell) == name]
            line.sort(key=value)
            axes.errorbar(
                [value(cell) for cell in line],
                [100 * cell["accuracy"]["mean"] for cell in line],
                yerr=[100 * (cell["accuracy"]["deviation"] or 0.0) for cell in line],
                label=name, color=_COLOURS[index % len(_COLOURS)], marker=_MARKERS[index % len(_MARKERS)], capsize=3,
                fillstyle="full" if index < len(_COLOURS) else "none",
            )  # fmt: skip
        for cell in zero_shot:
            if _panel(cell) == panel:
                _draw_zero_shot(axes, cell)
        axes.set_xscale("log")
        if path.stem in ("rank", "size"):  # a few numbers that someone chose
            chosen = sorted({value(cell) for cell in cells})
            axes.set_xticks(chosen, [f"{number:g}" for number in chosen])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy on test, %")
        axes.set_title(", ".join(panel))
    _add_legend(figure)
    return _save(figure, path)


def _draw_zero_shot(axes: Axes, cell: Cell) -> None:
    """A line; or a note below, where a line would leave what else is shown less than half of the panel."""
    low, high = axes.get_ylim()
    accuracy = 100 * cell["accuracy"]["mean"]
    if accuracy > low - (high - low):
        axes.axhline(accuracy, color="grey", linestyle=":", label=cell["method"])
    else:
        note = f"{cell['method']}: {accuracy:.1f} ↓"
        axes.annotate(note, (0.98, 0.03), xycoords="axes fraction", ha="right", color="grey")


def _grid(panels: int, height: float, *, heading: float = 0.0, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels; a shared y axis is labelled in the first column. All heights are inches."""
    from matplotlib import pyplot

    columns = min(panels, _COLUMNS)
    rows = math.ceil(panels / columns)
    size = (4.2 * columns + 2.4, height * rows + heading)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=share_y)
    for axes in grid.flat[panels:]:
        axes.remove()
    return figure, list(grid.flat[:panels])


def _add_legend(figure: Figure) -> None:
    """One legend for all panels, beside them."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(
        *axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _panel(cell: Cell) -> tuple[str, str]:
    return cell["base"], cell["data"]


def _method(cell: Cell) -> str:
    return str(cell["method"])


def _family(cell: Cell) -> str:
    """AdaLink of all ranks as one line, other methods each alone."""
    return f"AdaLink, {_variant(cell)}" if cell["settings"]["kind"] == "adalink" else _method(cell)


def _variant(cell: Cell) -> str:
    """What a line of several ranks has in common: activation, soft prompt, and a start or ratio of its own."""
    settings = cell["settings"]
    init, ratio, tokens = settings.get("init", "kaiming"), settings.get("lr_ratio", 1.0), settings.get("tokens")
    names = [
        settings["activation"],
        "" if init == "kaiming" else init,
        "" if ratio == 1.0 else f"rate ratio {ratio:g}",
        f"{tokens} soft tokens" if tokens else "",
    ]
    return ", ".join(filter(None, names))


def _size(size: Any) -> float:
    return float("inf") if size == "all" else float(size)


def _swept(cells: Sequence[Cell]) -> list[Cell]:
    """The cells of methods that were run with several sizes."""
    sizes: dict[str, set[Any]] = {}
    for cell in cells:
        sizes.setdefault(cell["method"], set()).add(cell["size"])
    return [cell for cell in cells if len(sizes[cell["method"]]) > 1]
