"""An evaluation on a terminal: the verdict first, tables of 80 columns."""

from __future__ import annotations

from adalink.tools.common.terminal_text import echo
from adalink.tools.evaluation.evaluate import hints, percent
from adalink.tools.evaluation.report import Estimate, Report, TaskReport

_WIDTH, _SHOWN_CLASSES, _SHOWN_ROWS = 80, 20, 5


def print_report(report: Report) -> None:
    """Print a report for people on stdout."""
    echo(report.verdict)
    echo()
    echo(f"{'task':<22}{'variant':<18}{'accuracy':<24}{'macro F1':>8}{'ms':>8}")
    for task in report.tasks:
        f1 = "-" if task.labels is None else f"{task.labels.macro_f1.value:.3f}"
        name, variant = _fit(task.task, 21), _fit(task.variant, 17)
        echo(f"{name:<22}{variant:<18}{_estimate(task.accuracy):<24}{f1:>8}{task.speed.median_ms:>8.1f}")
    for task in report.tasks:
        _print_task(task)


def _print_task(task: TaskReport) -> None:
    echo()
    echo(task.verdict)
    if task.wrong:
        echo(f"wrong rows, the most certain first ({len(task.wrong)}):")
    for row in task.wrong[:_SHOWN_ROWS]:
        sure = "" if row.probability is None else f" {row.probability:.2f}"
        said = f"  line {row.line}:{sure} {_fit(row.answer, 20)!r}, expected {_fit(row.expected, 20)!r}: "
        echo(said + _fit(row.text, max(10, _WIDTH - len(said))))
    if task.labels is not None:
        echo(f"{'label':<32}{'rows':>8}{'precision':>12}{'recall':>10}{'F1':>10}")
        for one in task.labels.classes[:_SHOWN_CLASSES]:
            echo(f"{_fit(one.label, 31):<32}{one.rows:>8}{one.precision:>12.3f}{one.recall:>10.3f}{one.f1:>10.3f}")
        if (more := len(task.labels.classes) - _SHOWN_CLASSES) > 0:
            echo(f"and {more} more: see --json or --html")
        echo(f"calibration error {task.labels.calibration_error:.3f}, macro F1 {_estimate(task.labels.macro_f1)}")
        for hint in hints(task.labels):
            echo(f"note: {hint}")
    if task.cut:
        echo(f"note: {task.cut} texts were cut: they are longer than the task takes")
    speed = task.speed
    echo(
        f"one row: {speed.median_ms:.1f} ms (95 %: {speed.p95_ms:.1f}); all: {speed.rows_per_second:.1f} rows/s, "
        f"{speed.tokens_per_second:.0f} tokens/s"
    )


def _estimate(one: Estimate) -> str:
    return f"{percent(one.value)} ({100 * one.low:.1f} to {100 * one.high:.1f})"


def _fit(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else f"{flat[: width - 1]}…"
