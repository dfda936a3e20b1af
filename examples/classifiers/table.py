"""Tables of the four-task proof, from its results: ``python -m examples.classifiers.table``.

They stand between the marks of three pages: see ``sections``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.classifiers.rows import TASKS

HERE = Path(__file__).parent
BEGIN, END = (
    "<!-- measured: written by python -m examples.classifiers.table -->",
    "<!-- end of measured classifiers -->",
)
METHODS = {
    "adalink": "AdaLink 16 + head (this kit)",
    "head": "head alone, frozen encoder (this kit)",
    "logistic": "logistic regression on embeddings",
    "lora": "LoRA 8 + head, a model each",
    "full": "full fine-tuning + head, a model each",
}
# What the latency of logistic regression is: the embedding, once for all tasks.
_LATENCY = {"logistic": "embedding"}


def figures(results: Mapping[str, Any], task: str, method: str, metric: str) -> list[float]:
    """One measure in percent, of each seed."""
    runs = [run for run in results["runs"] if (run["task"], run["method"]) == (task, method)]
    return [100 * run["metrics"][metric] for run in runs if metric in run["metrics"]]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def accuracy_table(results: Mapping[str, Any]) -> list[str]:
    """A row a method, a column a task: its main measure, mean and standard deviation."""
    rows = [
        [title, *(mean_and_spread(figures(results, task, method, TASKS[task].metric)) for task in TASKS)]
        for method, title in METHODS.items()
    ]
    titles = {"accuracy": "accuracy", "micro_f1": "micro F1", "span_f1": "span F1"}
    return _table(["", *(f"`{name}`, {titles[task.metric]}" for name, task in TASKS.items())], rows)


def macro_table(results: Mapping[str, Any]) -> list[str]:
    """The same of macro F1."""
    rows = [
        [title, *(mean_and_spread(figures(results, task, method, _macro(task))) for task in TASKS)]
        for method, title in METHODS.items()
    ]
    return _table(["macro F1", *(f"`{name}`" for name in TASKS)], rows)


def _macro(task: str) -> str:
    return "span_macro_f1" if TASKS[task].metric == "span_f1" else "macro_f1"


def cost_table(results: Mapping[str, Any]) -> list[str]:
    """A row a method: bytes of a task, memory, latency, training time."""
    return _table(
        [
            "",
            "bytes a task",
            "memory, 4 tasks",
            "40 tasks",
            "400 tasks",
            "a text under all 4 tasks",
            "training a task",
        ],
        [[title, *_costs(results, method)] for method, title in METHODS.items()],
    )


def short_table(results: Mapping[str, Any]) -> list[str]:
    """A row a method: means of the main measures, and the most telling costs."""
    titles = ["", *(f"`{name}`" for name in TASKS), "bytes a task", "memory, 400 tasks", "a text, 4 tasks"]
    rows = []
    for method, title in METHODS.items():
        means = [statistics.mean(figures(results, name, method, task.metric)) for name, task in TASKS.items()]
        size, _, _, memory, latency, _ = _costs(results, method)
        rows.append([title, *(f"{value:.1f}" for value in means), size, memory, latency])
    return _table(titles, rows)


def _costs(results: Mapping[str, Any], method: str) -> list[str]:
    sizes, memory = results["task_bytes"].get(method), results["memory"].get(method, {})
    seconds = [run["train_seconds"] for run in results["runs"] if run["method"] == method]
    latency = results["latency_ms"].get(_LATENCY.get(method, method))
    cells = ["-" if sizes is None else _bytes(statistics.mean(sizes))]
    for count in ("4", "40", "400"):
        entry = memory.get(count)
        cells.append("-" if entry is None else _bytes(entry["bytes"]) + ("" if entry["measured"] else " (calculated)"))
    return [*cells, "-" if latency is None else f"{latency:.1f} ms", f"{statistics.mean(seconds):.0f} s"]


def _bytes(value: float) -> str:
    return f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:,.0f} MB"


def seeds(results: Mapping[str, Any]) -> str:
    """How many seeds each task was trained with."""
    counts = {
        name: min(len(figures(results, name, method, task.metric)) for method in METHODS)
        for name, task in TASKS.items()
    }
    return f"Seeds: {', '.join(f'{count} of `{name}`' for name, count in counts.items())}."


def gains(results: Mapping[str, Any]) -> list[str]:
    """A sentence a task: what the bottleneck adds to the head, and how far full fine-tuning is."""
    lines = []
    for name, task in TASKS.items():
        means = {method: statistics.mean(figures(results, name, method, task.metric)) for method in METHODS}
        added, best = means["adalink"] - means["head"], means["full"] - means["adalink"]
        lines.append(
            f"- `{name}`: the bottleneck adds {added:+.1f} points to the head. "
            f"Full fine-tuning is {best:+.1f} points from there."
        )
    return lines


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]


def replace(path: Path, lines: Sequence[str]) -> None:
    """Write the lines between the marks of a page; raises ``ValueError`` if they are not there."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no marks {BEGIN} and {END}")
    path.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


def sections(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lines of each page, by its path."""
    accuracy, cost = accuracy_table(results), cost_table(results)
    details = ["", *accuracy, "", *macro_table(results), "", seeds(results), "", *gains(results), "", *cost, ""]
    return {
        "README.md": short_table(results),
        "docs/guides/classify.md": ["", *accuracy, "", *cost, ""],
        "examples/classifiers/README.md": details,
    }


def main() -> None:
    """Write all tables."""
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    for page, lines in sections(results).items():
        replace(HERE.parents[1] / page, lines)


if __name__ == "__main__":
    main()
