"""The tables of a study, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = list[tuple[str, ...]]
Table = tuple[tuple[str, ...], Rows]


def accuracy_rows(summary: Mapping[str, Any]) -> Table:
    """Columns and rows: each cell's accuracy over its seeds."""
    columns = ("base", "data", "rows", "method", "parameters", "learning rate", "accuracy", "seeds", "seconds")
    rows: Rows = []
    for cell in summary["cells"]:
        if cell["accuracy"] is None:
            rows.append((*_columns(cell), "", _rate(cell), "not measured", f"0 of {cell['seeds_wanted']}", ""))
            continue
        diverged = f", {cell['diverged']} diverged" if cell["diverged"] else ""
        rows.append((
            *_columns(cell), f"{cell['trained_parameters']:,} ({100 * cell['parameter_share']:.3g} %)", _rate(cell),
            _percent(cell["accuracy"]), f"{len(cell['seeds'])} of {cell['seeds_wanted']}{diverged}",
            f"{cell['train_seconds']:.0f}",
        ))  # fmt: skip
    return columns, rows


def comparison_rows(summary: Mapping[str, Any]) -> Table:
    """Columns and rows: each method minus one that it is compared with, in points of a percent."""
    columns = ("base", "data", "rows", "method", "minus", "difference", "95 % interval", "share of its accuracy")
    rows: Rows = []
    for pair in summary["comparisons"]:
        low_high = pair["interval"]
        interval = "-" if low_high is None else f"{100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f}"
        ratio = "-" if pair["ratio"] is None else f"{pair['ratio']:.3f}"
        rows.append((*_columns(pair), pair["against"], f"{100 * pair['mean']:+.1f}", interval, ratio))
    return columns, rows


def not_compared_line(summary: Mapping[str, Any]) -> str | None:
    """What there is no comparison of, because the study leaves out the method compared with; ``None`` for nothing."""
    missing: dict[str, list[str]] = {}
    for cell in summary["not_compared"]:
        missing.setdefault(cell["against"], []).append(f"{cell['data']} ({cell['base']}, rows: {cell['size']})")
    lines = [
        f"Nothing is paired with {name} on {', '.join(cells)}: the study does not run it there."
        for name, cells in missing.items()
    ]
    return " ".join(lines) or None


def overall_rows(summary: Mapping[str, Any]) -> Table:
    """Columns and rows: the pairs of all data sets together."""
    columns = ("base", "rows", "method", "minus", "pairs", "mean difference", "p (sign flips)")
    rows: Rows = [
        (pair["base"], str(pair["size"]), pair["method"], pair["against"], str(pair["pairs"]),
         f"{100 * pair['mean']:+.1f}", _p_value(pair["p_value"]))
        for pair in summary["overall"]
    ]  # fmt: skip
    return columns, rows


def shared_rows(summary: Mapping[str, Any]) -> Table:
    """Columns and rows: one of a method for each data set, and one for all that are combined."""
    columns = ("base", "data", "rows", "method", "one a data set", "one for all", "parameters", "of the one for all")
    rows: Rows = [
        (*_columns(pair), *("-" if pair[name] is None else _percent(pair[name]) for name in ("alone", "together")),
         *("-" if pair[name] is None else f"{pair[name]:,}" for name in ("parameters_alone", "parameters_together")))
        for pair in summary["shared"]
    ]  # fmt: skip
    return columns, rows


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"  # never 0: the untouched signs are a pattern too


def _columns(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return entry["base"], entry["data"], str(entry["size"]), entry["method"]


def _percent(accuracy: Mapping[str, float | None]) -> str:
    deviation = "" if accuracy["deviation"] is None else f" ± {100 * accuracy['deviation']:.1f}"
    return f"{100 * (accuracy['mean'] or 0.0):.1f}{deviation}"


def _rate(cell: Mapping[str, Any]) -> str:
    if cell["lr"] is None:
        return "-"
    return f"{cell['lr']:g}{' (end of the list)' if cell['lr_at_edge'] else ''}"
