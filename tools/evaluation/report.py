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


class CalibrationBin(_Part, frozen=True, kw_only=True):
    """Rows whose answer has a probability from ``low`` to ``high``: what it is in the mean, and how many are right."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


class WrongRow(_Part, frozen=True, kw_only=True):
    """A wrong answer; ``probability`` is that of the answer, ``None`` for text."""

    line: int
    text: str
    expected: str
    answer: str
    probability: float | None


class LabelMeasures(_Part, frozen=True, kw_only=True):
    """What is known of answers that are labels.

    Attributes:
        macro_f1: mean F1 of the labels that occur.
        classes: each label, the commonest first.
        confusion: rows by label and answer, both in the order of ``classes``.
        calibration_error: expected calibration error: how far probabilities are from the shares that are right.
        bins: ten bins of probability, those without rows left out.
    """

    macro_f1: Estimate
    classes: list[ClassMeasures]
    confusion: list[list[int]]
    calibration_error: float
    bins: list[CalibrationBin]


class Reference(_Part, frozen=True, kw_only=True):
    """What a task is compared with, on the same rows.

    Attributes:
        name: such as ``"always 'oil'"``.
        accuracy: its accuracy.
        gain: accuracy of the task less that of the reference; a paired bootstrap gives its interval.
        p_value: of McNemar's exact test: how likely so unequal a count of rows would be, of those that one of the two
            alone gets right, if both were equally good.
    """

    name: str
    accuracy: float
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
        kind: ``"labels"``, or ``"text"``, which is right if it is exactly the completion.
        rows: rows that were answered.
        cut: texts that were longer than the task takes, and were cut.
        accuracy: share of right answers: of text, exact match.
        labels: measures of labels; ``None`` for text.
        reference: what it is compared with; ``None`` for text without ``--against base``.
        speed: how fast the answers came.
        wrong: wrong answers, the most certain first.
        verdict: a sentence.
    """

    task: str
    variant: str
    kind: str
    rows: int
    cut: int
    accuracy: Estimate
    labels: LabelMeasures | None
    reference: Reference | None
    speed: Speed
    wrong: list[WrongRow]
    verdict: str


class Report(_Part, frozen=True, kw_only=True):
    """An evaluation: one file of rows, one or several tasks and variants.

    Attributes:
        verdict: a sentence on all of it.
        base: name of the base.
        data: name of the file of rows.
        data_sha256: its digest.
        kit_version: version of the kit.
        tasks: a report for each task and variant.
    """

    verdict: str
    base: str
    data: str
    data_sha256: str
    kit_version: str
    tasks: list[TaskReport]
