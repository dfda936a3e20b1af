"""The evaluation that a training ends with: of the adapter in PyTorch, on the eval rows, with the run's curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adalink.runtime.storage.head_spec import TOKENS
from adalink.tools.evaluation.answers import Answers, answers_of
from adalink.tools.evaluation.compare import against_base, against_constant
from adalink.tools.evaluation.page import render_page
from adalink.tools.evaluation.report import CurvePoint, Report, TaskReport, TrainingCurves
from adalink.tools.evaluation.rows import TEXT, Answer, rows_with_completions, rows_with_labels
from adalink.tools.evaluation.task_report import make_task_report
from adalink.training.outcome import ClassifiedRows, Outcome, RepliedRows, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE_FILE = "evaluation.html"
_WHERE = "PyTorch"


def make_page(outcome: Outcome) -> Mapping[str, bytes]:
    """The page of a finished training, as a file of its adapter folder."""
    return {PAGE_FILE: render_page(make_training_report(outcome)).encode()}


def make_training_report(outcome: Outcome) -> Report:
    """The evaluation of a finished training."""
    answers, record = outcome.answers, outcome.report
    if isinstance(answers, ClassifiedRows):
        made = _classified(outcome.name, answers)
    else:
        made = _replied(outcome.name, answers)
    return Report(
        verdict=made.verdict,
        base=record["base"],
        data=record["data"]["eval"]["file"],
        data_sha256=record["data"]["eval"]["sha256"],
        kit_version=record["kit_version"],
        tasks=[made],
        training=_curves(record),
    )


def _classified(name: str, answers: ClassifiedRows) -> TaskReport:
    kind = answers.head.problem_type
    rows = rows_with_labels(answers.rows, kind)
    said = answers_of(rows, answers.said)
    reference = None if kind == TOKENS else against_constant(kind, rows, said)
    return make_task_report(name, _WHERE, kind, rows, said, reference)


def _replied(name: str, answers: RepliedRows) -> TaskReport:
    rows = rows_with_completions(answers.rows)
    ours, base = _greedy(answers.replies), _greedy(answers.base_replies)
    return make_task_report(name, _WHERE, TEXT, rows, ours, against_base(ours, base), known=answers.labels or ())


def _greedy(replies: Sequence[Reply]) -> Answers:
    return Answers([Answer(reply.text) for reply in replies], np.array([reply.is_right for reply in replies]))


def _curves(record: Mapping[str, Any]) -> TrainingCurves:
    curve = record.get("eval_curve", [])
    measure = next((name for point in curve for name in point if name not in ("step", "loss")), "")
    return TrainingCurves(
        loss=_points(record["loss_curve"], "loss"),
        eval_loss=_points(curve, "loss"),
        eval_rows="validation rows" if "validation" in record["data"] else "eval rows",
        measure=measure.replace("_", " "),
        eval_measure=_points(curve, measure),
        best_step=record.get("best_step"),
    )


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> list[CurvePoint]:
    return [
        CurvePoint(step=entry["step"], value=entry[name])
        for entry in entries
        if entry.get(name) is not None and np.isfinite(entry[name])
    ]
