"""An evaluation: every task on every variant, against a reference, on one file of rows."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from adalink.runtime.errors import RequestError
from adalink.runtime.storage.digest import digest_file
from adalink.tools.evaluation.answers import Answers, Progress, check_labels, classify_rows, generate_rows, labels_of
from adalink.tools.evaluation.metrics import gain, majority, mcnemar, measure_labels, wilson
from adalink.tools.evaluation.report import LabelMeasures, Reference, Report, TaskReport, WrongRow
from adalink.tools.evaluation.rows import EvalRow

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment

MAJORITY, BASE = "majority", "base"
# A difference with a larger p-value is not called one.
_SIGNIFICANT = 0.05


def evaluate_task(
    deployment: Deployment,
    task: str,
    variant: str,
    rows: Sequence[EvalRow],
    origin: Path,
    progress: Progress,
    *,
    against: str | None = None,
    calibration: str | None = None,
) -> TaskReport:
    """Evaluate one task of an open deployment.

    Args:
        deployment: the deployment.
        task: the task.
        variant: name of the variant that is open, for the report.
        rows: rows with right answers.
        origin: their file, for messages.
        progress: called as ``progress_bar`` says.
        against: ``"base"`` or ``"majority"``; by default the commonest label, for labels.
        calibration: see ``Deployment.classify``.

    Raises:
        RequestError: the task cannot be evaluated, or compared so.
        DataError: a row has a label that the task never gives.
    """
    labels = labels_of(deployment, task)
    settings = deployment.manifest.tasks[task]
    if against == BASE and settings.head is not None:
        raise RequestError(f"the base has no head, as task {task!r} has: compare with --against majority")
    if labels is None:
        if against == MAJORITY or calibration is not None:
            raise RequestError(f"task {task!r} gives text: --against majority and --calibrate are for labels")
        answers = generate_rows(deployment, rows, task, progress)
    else:
        check_labels(rows, labels, task, origin)
        answers = classify_rows(deployment, rows, task, progress, calibration=calibration)
    reference = _reference(deployment, task, rows, answers, progress, against, calibration)
    accuracy = wilson(int(answers.right.sum()), len(rows))
    measures = None
    if answers.confidence is not None:
        measures = measure_labels([row.label for row in rows], answers.given, answers.confidence)
    report = TaskReport(
        task=task,
        variant=variant,
        kind="text" if measures is None else "labels",
        rows=len(rows),
        cut=answers.cut,
        accuracy=accuracy,
        labels=measures,
        reference=reference,
        speed=answers.speed,
        wrong=_wrong(rows, answers),
        verdict="",
    )
    return replace(report, verdict=make_verdict(report))


def make_report(deployment: Deployment, data: Path, tasks: Sequence[TaskReport]) -> Report:
    """The report on all tasks and variants."""
    verdict = tasks[0].verdict
    if len(tasks) > 1:
        best = max(tasks, key=lambda one: one.accuracy.value)
        below = [one for one in tasks if one.reference is not None and _comparison(one.reference) != "it is better"]
        doubt = f" {len(below)} of them are not shown to be better than their reference." if below else ""
        verdict = f"{len(tasks)} evaluated. The best: {best.verdict}{doubt}"
    return Report(
        verdict=verdict,
        base=deployment.manifest.base.name,
        data=data.name,
        data_sha256=digest_file(data),
        kit_version=version("adalink-kit"),
        tasks=list(tasks),
    )


def name_of(report: TaskReport) -> str:
    """Task and variant, as they are called in tables."""
    return f"{report.task} ({report.variant})"


def _reference(
    deployment: Deployment,
    task: str,
    rows: Sequence[EvalRow],
    answers: Answers,
    progress: Progress,
    against: str | None,
    calibration: str | None,
) -> Reference | None:
    settings = deployment.manifest.tasks[task]
    if against == BASE:
        if settings.labels is None:
            theirs = generate_rows(deployment, rows, None, progress).right
        else:
            given = settings.labels.completions
            theirs = classify_rows(deployment, rows, None, progress, labels=given, calibration=calibration).right
        name = "the base model"
    elif answers.confidence is not None:
        commonest = majority([row.label for row in rows])
        theirs, name = np.array([row.label == commonest for row in rows]), f"always {commonest!r}"
    else:
        return None
    difference, p_value = gain(answers.right, theirs), mcnemar(answers.right, theirs)
    return Reference(name=name, accuracy=float(theirs.mean()), gain=difference, p_value=p_value)


def _wrong(rows: Sequence[EvalRow], answers: Answers) -> list[WrongRow]:
    wrong = []
    for index in np.flatnonzero(~answers.right).tolist():
        row, confidence = rows[index], answers.confidence
        text = row.text if row.text_pair is None else f"{row.text} | {row.text_pair}"
        wrong.append(
            WrongRow(
                line=row.line,
                text=text,
                expected=row.label,
                answer=answers.given[index],
                probability=None if confidence is None else float(confidence[index]),
            )
        )
    return sorted(wrong, key=lambda row: -(row.probability or 0.0))


def make_verdict(report: TaskReport) -> str:
    """What a report says, in a sentence."""
    accuracy, reference = report.accuracy, report.reference
    said = f"{name_of(report)} is right on {percent(accuracy.value)} of {report.rows} rows"
    said += f" ({percent(accuracy.low)} to {percent(accuracy.high)})"
    if reference is not None:
        said += f", {reference.name} on {percent(reference.accuracy)}: {_comparison(reference)}"
    return f"{said}."


def _comparison(reference: Reference) -> str:
    if reference.p_value >= _SIGNIFICANT:
        return "no difference is shown"
    return "it is better" if reference.gain.value > 0 else "it is worse"


def percent(share: float) -> str:
    """A share for people."""
    return f"{100 * share:.1f} %"


def hints(measures: LabelMeasures) -> list[str]:
    """What to do next, from the measures of labels."""
    found = []
    if never := [one.label for one in measures.classes if one.rows and not one.answers]:
        found.append(f"never answered: {', '.join(never):.100}: give it more rows")
    if few := [one.label for one in measures.classes if 0 < one.rows < 10]:
        found.append(f"fewer than 10 rows: {', '.join(few):.100}: their figures say little")
    if measures.calibration_error > 0.1:
        found.append(f"probabilities are {percent(measures.calibration_error)} off in the mean: do not rely on them")
    return found
