"""An evaluation on a terminal: the verdict first, tables of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from adalink.tools.evaluation.report import ClassMeasures, NumberMeasures, Report, TaskReport
from adalink.tools.evaluation.verdict import show_measure
from adalink.tools.terminal.terminal_text import echo

_WIDTH, _SHOWN_CLASSES, _SHOWN_ROWS = 80, 20, 5


def print_report(report: Report) -> None:
    """Print a report for people on stdout."""
    echo(report.verdict)
    echo()
    echo(f"{'task':<22}{'variant':<18}{'result':<24}{'macro F1':>8}{'ms':>8}")
    for task in report.tasks:
        measured = task.labels and task.labels.macro_f1.value
        f1 = task.items.macro_f1 if task.items is not None else measured
        name, variant = _fit(task.task, 21), _fit(task.variant, 17)
        speed = "-" if task.speed is None else f"{task.speed.median_ms:.1f}"
        echo(f"{name:<22}{variant:<18}{show_measure(task):<24}{'-' if f1 is None else f'{f1:.3f}':>8}{speed:>8}")
    for task in report.tasks:
        _print_task(task)


def _print_task(task: TaskReport) -> None:
    echo()
    echo(task.verdict)
    if task.wrong:
        wrong = f"wrong rows, the most certain first ({len(task.wrong)}):"
        echo("largest errors:" if task.numbers is not None else wrong)
    for row in task.wrong[:_SHOWN_ROWS]:
        sure = "" if row.probability is None else f" {row.probability:.2f}"
        said = f"  line {row.line}:{sure} {_fit(row.answer, 20)!r}, expected {_fit(row.expected, 20)!r}: "
        echo(said + _fit(row.text, max(10, _WIDTH - len(said))))
    if task.labels is not None:
        _print_classes(task.labels.classes)
        f1, error = task.labels.macro_f1, task.labels.calibration_error
        calibrated = "" if error is None else f"calibration error {error:.3f}, "
        echo(f"{calibrated}macro F1 {f1.value:.3f} ({f1.low:.3f} to {f1.high:.3f})")
    if (items := task.items) is not None:
        _print_classes(items.classes)
        echo(f"precision {items.precision:.3f}, recall {items.recall:.3f}, micro F1 {items.f1.value:.3f}")
    if task.numbers is not None:
        _print_numbers(task.numbers)
    for note in task.notes:
        echo(f"note: {note}")
    if task.speed is not None:
        speed = task.speed
        echo(
            f"one row: {speed.median_ms:.1f} ms (95 %: {speed.p95_ms:.1f}); all: {speed.rows_per_second:.1f} rows/s, "
            f"{speed.tokens_per_second:.0f} tokens/s"
        )


def _print_classes(classes: Sequence[ClassMeasures]) -> None:
    echo(f"{'label':<32}{'rows':>8}{'precision':>12}{'recall':>10}{'F1':>10}")
    for one in classes[:_SHOWN_CLASSES]:
        echo(f"{_fit(one.label, 31):<32}{one.rows:>8}{one.precision:>12.3f}{one.recall:>10.3f}{one.f1:>10.3f}")
    if (more := len(classes) - _SHOWN_CLASSES) > 0:
        echo(f"and {more} more: see --json or --html")


def _print_numbers(numbers: NumberMeasures) -> None:
    r2, pearson, spearman = (
        "-" if value is None else f"{value:.3f}" for value in (numbers.r2, numbers.pearson, numbers.spearman)
    )
    echo(f"RMSE {numbers.root_mean_squared_error:.4g}, R2 {r2}, Pearson {pearson}, Spearman {spearman}")


def _fit(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"
