"""The report on one task: measures of its answers by their kind, and which are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS
from adalink.tools.evaluation.answers import Answers
from adalink.tools.evaluation.item_metrics import measure_items
from adalink.tools.evaluation.metrics import measure_labels, wilson
from adalink.tools.evaluation.number_metrics import measure_numbers
from adalink.tools.evaluation.report import ItemMeasures, LabelMeasures, NumberMeasures, Reference, TaskReport, WrongRow
from adalink.tools.evaluation.rows import Answer, EvalRow
from adalink.tools.evaluation.verdict import make_verdict

# What stands for greedy text that is no label.
OTHER_TEXT = "(other text)"
_LARGEST_ERRORS = 50


def make_task_report(
    task: str,
    variant: str,
    kind: str,
    rows: Sequence[EvalRow],
    answers: Answers,
    reference: Reference | None,
    *,
    known: Sequence[str] = (),
) -> TaskReport:
    """The report on one task.

    Args:
        task: the task.
        variant: what it ran on.
        kind: ``TEXT`` or a problem type of heads.
        rows: rows with right answers.
        answers: the answers.
        reference: what it is compared with.
        known: of text, the labels that it should be one of, if so: they are measured as labels too.
    """
    report = TaskReport(
        task=task,
        variant=variant,
        kind=kind,
        rows=len(rows),
        cut=answers.cut,
        accuracy=None if kind == REGRESSION else wilson(int(answers.right.sum()), len(rows)),
        labels=_labels(kind, rows, answers, known),
        items=_items(kind, rows, answers),
        numbers=_numbers(kind, rows, answers),
        reference=reference,
        speed=answers.speed,
        wrong=_largest_errors(rows, answers) if kind == REGRESSION else _wrong(rows, answers),
    )
    return replace(report, verdict=make_verdict(report), notes=_notes(report))


def _labels(kind: str, rows: Sequence[EvalRow], answers: Answers, known: Sequence[str]) -> LabelMeasures | None:
    expected, given = [row.expected.text for row in rows], [one.text for one in answers.given]
    if kind == SINGLE_LABEL:
        return measure_labels(expected, given, answers.confidence)
    if not known:
        return None
    # A label counts only where the text also ends there: the exact match says the same.
    wrong = [one if one in known and (right or one != other) else OTHER_TEXT for one, right, other in zip(
        given, answers.right.tolist(), expected, strict=True)]  # fmt: skip
    return measure_labels(expected, wrong, None)


def _items(kind: str, rows: Sequence[EvalRow], answers: Answers) -> ItemMeasures | None:
    if kind not in (MULTI_LABEL, TOKENS):
        return None
    return measure_items([row.expected.items for row in rows], [one.items for one in answers.given])


def _numbers(kind: str, rows: Sequence[EvalRow], answers: Answers) -> NumberMeasures | None:
    if kind != REGRESSION:
        return None
    return measure_numbers([row.expected.value for row in rows], [one.value for one in answers.given])


def _wrong(rows: Sequence[EvalRow], answers: Answers) -> list[WrongRow]:
    confidence = answers.confidence
    wrong = [
        WrongRow(
            line=rows[index].line,
            text=_text(rows[index]),
            expected=describe(rows[index].expected, rows[index].text),
            answer=describe(answers.given[index], rows[index].text),
            probability=None if confidence is None else float(confidence[index]),
        )
        for index in np.flatnonzero(~answers.right).tolist()
    ]
    return sorted(wrong, key=lambda row: -(row.probability or 0.0))


def _largest_errors(rows: Sequence[EvalRow], answers: Answers) -> list[WrongRow]:
    errors = [one.value - row.expected.value for one, row in zip(answers.given, rows, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: -abs(errors[index]))
    return [
        WrongRow(
            line=rows[index].line,
            text=_text(rows[index]),
            expected=f"{rows[index].expected.value:.6g}",
            answer=f"{answers.given[index].value:.6g}",
            probability=None,
            error=errors[index],
        )
        for index in order[:_LARGEST_ERRORS]
        if errors[index]
    ]


def _text(row: EvalRow) -> str:
    text = row.text if row.text_pair is None else f"{row.text} | {row.text_pair}"
    return f"{text} [{', '.join(path.name for path in row.images)}]" if row.images else text


def describe(answer: Answer, text: str) -> str:
    """An answer for people: a label or text, labels, or spans with their texts."""
    if not answer.items:
        return answer.text or "(nothing)"
    labels = sorted(item for item in answer.items if isinstance(item, str))
    spans = sorted(item for item in answer.items if not isinstance(item, str))
    return ", ".join([*labels, *(f"{kind} {text[start:end]!r}" for start, end, kind in spans)])


def _notes(report: TaskReport) -> list[str]:
    """What to do next, from the measures."""
    found = []
    named = report.labels or report.items
    if named is not None:
        if never := [one.label for one in named.classes if one.rows and not one.answers]:
            found.append(f"never answered: {', '.join(never):.100}: give it more rows")
        if few := [one.label for one in named.classes if 0 < one.rows < 10]:
            found.append(f"fewer than 10 rows: {', '.join(few):.100}: their figures say little")
    if report.labels is not None and (report.labels.calibration_error or 0.0) > 0.1:
        off = f"{100 * (report.labels.calibration_error or 0.0):.1f} %"
        found.append(f"probabilities are {off} off in the mean: do not rely on them")
    if report.cut:
        found.append(f"{report.cut} texts were cut: they are longer than the task takes")
    return found
