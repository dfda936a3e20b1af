"""Tables and plot of the stored run. ``python -m benchmarks.size.report`` writes the page's part again."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.size.cases import GENAI, KIT_INT4, SMOLLM2
from benchmarks.size.plot import draw
from benchmarks.table import table

BEGIN, END = "<!-- measured: written by make bench-size -->", "<!-- end of measured sizes -->"
STORED = Path("benchmarks/results/size.json")
PLOT = Path("benchmarks/results/size.png")
PAGE = Path("docs/benchmarks.md")
# Figures of a round: name, unit and form in a table.
FIGURES = {
    "resident_mb": ("resident", ", MB", "{:,.0f}"),
    "open_s": ("opening", ", s", "{:.2f}"),
    "first_token_ms": ("first token", ", ms", "{:,.0f}"),
    "tok_s_1": ("tokens/s, 1 row", "", "{:,.0f}"),
    "tok_s_16": ("tokens/s, 16 rows", "", "{:,.0f}"),
}
Cases = Mapping[str, Mapping[str, Any]]


def median(case: Mapping[str, Any], field: str) -> float | None:
    """Median over the rounds; ``None`` for what was not measured."""
    values = [figures[field] for figures in case.get("rounds", []) if field in figures]
    return statistics.median(values) if values else None


def ratio(cases: Cases, above: str, below: str, field: str) -> float | None:
    """Median of the rounds' own ratios of two cases; ``None`` for what was not measured."""
    pairs = zip(*(cases.get(name, {}).get("rounds", []) for name in (above, below)), strict=False)
    ratios = [top[field] / bottom[field] for top, bottom in pairs if field in top and field in bottom]
    return statistics.median(ratios) if ratios else None


def measured_fields(cases: Cases) -> list[str]:
    """Figures that some case has."""
    return [field for field in FIGURES if any(median(case, field) is not None for case in cases.values())]


def figure_rows(cases: Cases) -> list[list[str]]:
    """The table of a model, without its head."""
    fields = measured_fields(cases)
    rows = []
    for case in cases.values():
        if "error" in case:
            rows.append([case["label"], case["error"], *[""] * len(fields)])
            continue
        values = [(median(case, field), FIGURES[field][2]) for field in fields]
        cells = ["" if value is None else form.format(value) for value, form in values]
        rows.append([case["label"], f"{case['shipped_bytes'] / 1e6:,.0f}", *cells])
    return rows


def ratio_rows(cases: Cases) -> list[list[str]]:
    """What the kit's int4 has of each peer's figure."""
    rows = []
    for name, case in cases.items():
        if name.startswith("kit") or "error" in case or "error" in cases[KIT_INT4.name]:
            continue
        ratios = [ratio(cases, KIT_INT4.name, name, field) for field in measured_fields(cases)]
        size = cases[KIT_INT4.name]["shipped_bytes"] / case["shipped_bytes"]
        rows.append([case["label"], f"{size:.2f}", *("" if value is None else f"{value:.2f}" for value in ratios)])
    return rows


def accuracy_rows(cases: Cases) -> list[list[str]]:
    """Accuracy of the example tasks against the size."""
    measured = sorted((case for case in cases.values() if case.get("accuracy")), key=lambda case: case["shipped_bytes"])
    return [
        [case["label"], f"{case['shipped_bytes'] / 1e6:,.0f}", *(f"{100 * task['right']:.2f} %" for task in tasks)]
        for case in measured
        for tasks in [list(case["accuracy"]["tasks"].values())]
    ]


def export_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Exporters that make the same of one checkpoint: time and memory, medians of the rounds."""
    rows = []
    for model in report.values():
        for name, case in model["cases"].items():
            if name not in (KIT_INT4.name, GENAI.name):
                continue
            if "error" in case:
                rows.append([model["label"], case["label"], case["error"], ""])
                continue
            times = [export["seconds"] for export in case["exports"] if "seconds" in export]
            peak = statistics.median(export["peak_bytes"] for export in case["exports"])
            seconds = f"{statistics.median(times):.0f}" if times else ""
            rows.append([model["label"], case["label"], seconds, f"{peak / 1e9:.1f}"])
    return rows


def section(report: Mapping[str, Any]) -> str:
    """The part of the page."""
    lines = []
    for name, model in report.items():
        settings, cases = model["settings"], model["cases"]
        shown = [FIGURES[field] for field in measured_fields(cases)]
        said = [f"Measured on {model['date']}: {model['environment']['cpu']}, {settings['threads']} threads,"]
        said += [f"{settings['new_tokens']} new tokens, rounds: {settings['rounds']}.", model["load"]]
        lines += [f"### {model['label']}", "", *textwrap.wrap(" ".join(said), 120, break_on_hyphens=False), ""]
        if name == SMOLLM2 and (scored := accuracy_rows(cases)):
            tasks = next(case["accuracy"]["tasks"] for case in cases.values() if case.get("accuracy"))
            heads = [f"`{task}`, {figures['rows']:,} rows" for task, figures in tasks.items()]
            lines += [*table(["", "shipped, MB", *heads], scored), ""]
        lines += [*table(["", "shipped, MB", *(title + unit for title, unit, _ in shown)], figure_rows(cases)), ""]
        if ratios := ratio_rows(cases):
            lines += [
                "The kit's int4 over each peer:",
                "",
                *table(["", "shipped", *(title for title, _, _ in shown)], ratios),
                "",
            ]
    lines += ["### Exports", "", *table(["", "", "seconds", "peak memory, GB"], export_rows(report))]
    return "\n".join(lines)


def write(report: Mapping[str, Any]) -> None:
    """Write the page's part, and the plot if there is accuracy to plot."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"{PAGE} has no marks {BEGIN} and {END}: put them where the measured part belongs")
    PAGE.write_text(f"{before}{BEGIN}\n\n{section(report)}\n\n{END}{after}", encoding="utf-8")
    if any(case.get("accuracy") for case in report.get(SMOLLM2, {}).get("cases", {}).values()):
        draw(report, PLOT)


if __name__ == "__main__":
    write(json.loads(STORED.read_text(encoding="utf-8")))
