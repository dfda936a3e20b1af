"""What an evaluation found, as typed objects; JSON of them is the report file. Shares are from 0 to 1."""

from __future__ import annotations

import msgspec


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the report, by keyword alone."""


class Estimate(_Part, frozen=True, kw_only=True):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class ClassMeasures(_Part, frozen=True, kw_only=True):
    """One label: of ``rows`` rows that have it, and ``answers`` answers that say it."""

    label: str
    rows: int
    answers: int
    precision: float
    recall: float
    f1: float


class ItemMeasures(_Part, frozen=True, kw_only=True):
    """What is known of answers that are several labels, or spans: all of them together, then each label.

    Attributes:
        f1: F1 of all items together (micro F1), with a bootstrap interval over rows.
        precision: of the items that were given, the share that is right.
        recall: of the right items, the share that was given.
        macro_f1: mean F1 of the labels.
        right: items that are right.
        expected: items of the rows.
        given: items of the answers.
        classes: each label, the commonest first; ``rows`` and ``answers`` count items.
    """

    f1: Estimate
    precision: float
    recall: float
    macro_f1: float
    right: int
    expected: int
    given: int
    classes: list[ClassMeasures]


class NumberMeasures(_Part, frozen=True, kw_only=True):
    """What is known of answers that are numbers; ``None`` is not defined, as where all numbers are one.

    Attributes:
        mean_absolute_error: with a bootstrap interval.
        root_mean_squared_error: larger errors count more.
        r2: share of the variance that is explained; below 0, the mean would be better.
        pearson: linear correlation.
        spearman: correlation of ranks.
        points: right number and answer, of 400 rows at most.
    """

    mean_absolute_error: Estimate
    root_mean_squared_error: float
    r2: float | None
    pearson: float | None
    spearman: float | None
    points: list[tuple[float, float]]


class CalibrationBin(_Part, frozen=True, kw_only=True):
    """Rows whose answer has a probability from ``low`` to ``high``: what it is in the mean, and how many are right."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


class WrongRow(_Part, frozen=True, kw_only=True):
    """A wrong answer; ``probability`` is that of the answer, ``None`` where there is none. ``error`` is of numbers."""

    line: int
    text: str
    expected: str
    answer: str
    probability: float | None
    error: float | None = None


class LabelMeasures(_Part, frozen=True, kw_only=True):
    """What is known of answers that are labels.

    Attributes:
        macro_f1: mean F1 of the labels that occur.
        classes: each label, the commonest first.
        confusion: rows by label and answer, both in the order of ``classes``.
        calibration_error: expected calibration error: how far probabilities are from the shares that are right;
            ``None`` where answers have no probability.
        bins: ten bins of probability, those without rows left out.
    """

    macro_f1: Estimate
    classes: list[ClassMeasures]
    confusion: list[list[int]]
    calibration_error: float | None
    bins: list[CalibrationBin]


class Reference(_Part, frozen=True, kw_only=True):
    """What a task is compared with, on the same rows.

    Attributes:
        name: such as ``"always 'oil'"``.
        value: its accuracy; of numbers, its mean absolute error.
        gain: how much better the task is: in accuracy, or by how much its error is smaller. A paired bootstrap gives
            the interval.
        p_value: of McNemar's exact test: how likely so unequal a count of rows would be, of those that one of the two
            alone gets right, if both were equally good. Of numbers, of a paired permutation test of the errors.
    """

    name: str
    value: float
    gain: Estimate
    p_value: float


class Speed(_Part, frozen=True, kw_only=True):
    """Latency of one row alone in milliseconds, and throughput of all rows together.

    ``tokens_per_second`` counts tokens of the prompts, and generated ones.
    """

    median_ms: float
    p95_ms: float
    rows_per_second: float
    tokens_per_second: float


class TaskReport(_Part, frozen=True, kw_only=True):
    """One task on one variant of the base.

    Attributes:
        task: the task.
        variant: the variant of the base.
        kind: ``"text"``, which is right if it is exactly the completion; else the problem type, as of heads.
        rows: rows that were answered.
        cut: texts that were longer than the task takes, and were cut.
        accuracy: share of right answers. Several labels, or spans, are right if all of them are. ``None`` for numbers.
        labels: measures of one label; ``None`` for other answers, as the two below.
        items: measures of several labels, or of spans.
        numbers: measures of numbers.
        reference: what it is compared with; ``None`` for text without ``--against base``, and for spans.
        speed: how fast the answers came; ``None`` at the end of a training.
        wrong: wrong answers, the most certain first; of numbers those of the largest errors, 50 at most.
        verdict: a sentence.
        notes: what is worth knowing beside.
    """

    task: str
    variant: str
    kind: str
    rows: int
    cut: int
    accuracy: Estimate | None
    labels: LabelMeasures | None = None
    items: ItemMeasures | None = None
    numbers: NumberMeasures | None = None
    reference: Reference | None = None
    speed: Speed | None = None
    wrong: list[WrongRow]
    verdict: str = ""
    notes: list[str] = []


class CurvePoint(_Part, frozen=True, kw_only=True):
    """A step of a training and a figure there."""

    step: int
    value: float


class TrainingCurves(_Part, frozen=True, kw_only=True):
    """How a training went.

    Attributes:
        loss: mean loss of the training rows since the point before.
        eval_loss: loss on rows that are not learned.
        eval_rows: what these rows are.
        measure: name of what was measured there beside the loss; empty for nothing.
        eval_measure: its values.
        best_step: the step whose weights the adapter has; ``None`` for the last.
    """

    loss: list[CurvePoint]
    eval_loss: list[CurvePoint]
    eval_rows: str
    measure: str = ""
    eval_measure: list[CurvePoint] = []
    best_step: int | None = None


class Report(_Part, frozen=True, kw_only=True):
    """An evaluation: one file of rows, one or several tasks and variants.

    Attributes:
        verdict: a sentence on all of it.
        base: name of the base.
        data: name of the file of rows.
        data_sha256: its digest.
        kit_version: version of the kit.
        tasks: a report for each task and variant.
        training: curves of the training that it ends; ``None`` for an evaluation of a deployment.
    """

    verdict: str
    base: str
    data: str
    data_sha256: str
    kit_version: str
    tasks: list[TaskReport]
    training: TrainingCurves | None = None
