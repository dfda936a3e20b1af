"""What an evaluation says in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, TOKENS
from adalink.tools.evaluation.compare import is_better, judge
from adalink.tools.evaluation.report import Estimate, TaskReport


def name_of(report: TaskReport) -> str:
    """Task and variant, as they are called in tables."""
    return f"{report.task} ({report.variant})"


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def main_measure(report: TaskReport) -> tuple[str, Estimate]:
    """Name and value of the figure that a task is judged by."""
    if report.numbers is not None:
        return "mean absolute error", report.numbers.mean_absolute_error
    if report.kind == TOKENS and report.items is not None:
        return "span F1", report.items.f1
    assert report.accuracy is not None
    return "accuracy", report.accuracy


def show_measure(report: TaskReport) -> str:
    """The same for people, with its interval."""
    _, one = main_measure(report)
    if report.kind == REGRESSION:
        return f"error {one.value:.4g} ({one.low:.4g} to {one.high:.4g})"
    if report.kind == TOKENS:
        return f"F1 {one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
    return f"{percent(one.value)} ({100 * one.low:.1f} to {100 * one.high:.1f})"


def make_verdict(report: TaskReport) -> str:
    """What the report on a task says."""
    _, one = main_measure(report)
    name, reference = name_of(report), report.reference
    if report.kind == REGRESSION:
        said = f"{name} is off by {one.value:.4g} in the mean of {report.rows} rows ({one.low:.4g} to {one.high:.4g})"
    elif report.kind == TOKENS and report.items is not None:
        items = report.items
        said = (
            f"{name} has an F1 of {one.value:.3f} ({one.low:.3f} to {one.high:.3f}): {items.right} of {items.expected} "
            f"spans in {report.rows} rows are found exactly, and {items.given} were given"
        )
    else:
        all_labels = "all labels of " if report.kind == MULTI_LABEL else ""
        said = f"{name} is right on {all_labels}{percent(one.value)} of {report.rows} rows"
        said += f" ({percent(one.low)} to {percent(one.high)})"
    if reference is not None:
        how = "by" if report.kind == REGRESSION else "on"
        said += f", {reference.name} {how} {show_reference(report)}: {judge(reference)}"
    return f"{said}."


def show_reference(report: TaskReport) -> str:
    """The figure of what a task is compared with, for people; empty without one."""
    if report.reference is None:
        return ""
    value = report.reference.value
    return f"{value:.4g}" if report.kind == REGRESSION else percent(value)


def sum_up(tasks: Sequence[TaskReport]) -> str:
    """What a report on several tasks or variants says."""
    if len(tasks) == 1:
        return tasks[0].verdict
    if len({main_measure(task)[0] for task in tasks}) > 1:
        return f"{len(tasks)} evaluated, of different kinds. The first: {tasks[0].verdict}"
    sign = -1 if tasks[0].kind == REGRESSION else 1
    best = max(tasks, key=lambda task: sign * main_measure(task)[1].value)
    below = [task for task in tasks if task.reference is not None and not is_better(task.reference)]
    doubt = f" {len(below)} of them are not shown to be better than their reference." if below else ""
    return f"{len(tasks)} evaluated. The best: {best.verdict}{doubt}"
