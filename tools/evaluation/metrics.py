"""Measures of answers: by scikit-learn where it has them, with confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import BackendUnavailableError
from adalink.runtime.extras import install_command
from adalink.tools.evaluation.report import CalibrationBin, ClassMeasures, Estimate, LabelMeasures

# Standard deviations of a two-sided interval of 95 %.
_Z = 1.959963984540054
RESAMPLES, SEED, _BINS = 2000, 0, 10

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]


def check_installed() -> None:
    """Check that scikit-learn is there, before anything slow; raises ``BackendUnavailableError``."""
    if find_spec("sklearn") is None:
        raise BackendUnavailableError(
            f"an evaluation measures with scikit-learn, which is not installed: {install_command('eval')}"
        )


def wilson(right: int, rows: int) -> Estimate:
    """A share of rows, with Wilson's score interval."""
    share, square = right / rows, _Z * _Z
    middle = (share + square / (2 * rows)) / (1 + square / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows)) / (1 + square / rows)
    return Estimate(value=share, low=max(0.0, min(middle - half, share)), high=min(1.0, max(middle + half, share)))


def gain(ours: Flags, theirs: Flags) -> Estimate:
    """Difference of two accuracies on the same rows, with a seeded, paired bootstrap interval."""
    difference = ours.astype(np.float64) - theirs.astype(np.float64)
    rng = np.random.default_rng(SEED)
    means = [difference[rng.integers(0, len(ours), len(ours))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value=float(difference.mean()), low=float(low), high=float(high))


def mcnemar(ours: Flags, theirs: Flags) -> float:
    """Two-sided p-value of McNemar's exact test on right answers to the same rows."""
    first, second = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    rows, fewer = first + second, min(first, second)
    return min(1.0, 2 * sum(math.comb(rows, count) for count in range(fewer + 1)) / (1 << rows))


def majority(expected: Sequence[str]) -> str:
    """The commonest label; of several, the first by name."""
    counts = Counter(expected)
    return min(counts, key=lambda label: (-counts[label], label))


def measure_labels(expected: Sequence[str], answers: Sequence[str], confidence: Numbers | None) -> LabelMeasures:
    """Measures of answers that are labels.

    Args:
        expected: the right label of each row.
        answers: the label that was given.
        confidence: its probability, shape ``(rows,)``; ``None`` where answers have none.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    counts, said = Counter(expected), Counter(answers)
    names = sorted(counts.keys() | said.keys(), key=lambda name: (-counts[name], name))
    precision, recall, f1, _ = precision_recall_fscore_support(expected, answers, labels=names, zero_division=0.0)
    confusion = confusion_matrix(expected, answers, labels=names)
    classes = [
        ClassMeasures(
            label=name, rows=counts[name], answers=said[name], precision=float(p), recall=float(r), f1=float(f)
        )
        for name, p, r, f in zip(names, precision, recall, f1, strict=True)
    ]
    right = np.array([one == other for one, other in zip(expected, answers, strict=True)])
    error, bins = (None, []) if confidence is None else calibration(right, confidence)
    return LabelMeasures(
        macro_f1=_macro_f1(confusion, float(np.mean(f1))),
        classes=classes,
        confusion=confusion.tolist(),
        calibration_error=error,
        bins=bins,
    )


def _macro_f1(confusion: npt.NDArray[np.int64], value: float) -> Estimate:
    """The mean F1 with a seeded bootstrap interval: rows are drawn anew from the cells of the confusion matrix."""
    rng, rows = np.random.default_rng(SEED), int(confusion.sum())
    drawn = rng.multinomial(rows, confusion.ravel() / rows, size=RESAMPLES).reshape(-1, *confusion.shape)
    right = np.diagonal(drawn, axis1=1, axis2=2)
    total = drawn.sum(axis=1) + drawn.sum(axis=2)
    occurs = total > 0
    scores = np.where(occurs, 2 * right / np.maximum(total, 1), 0.0).sum(axis=1) / occurs.sum(axis=1)
    low, high = np.quantile(scores, [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def calibration(right: Flags, confidence: Numbers) -> tuple[float, list[CalibrationBin]]:
    """Expected calibration error over ten equal bins, and those bins that have rows."""
    places = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    bins = []
    for place in range(_BINS):
        chosen = places == place
        if chosen.any():
            bins.append(
                CalibrationBin(
                    low=place / _BINS,
                    high=(place + 1) / _BINS,
                    rows=int(chosen.sum()),
                    confidence=float(confidence[chosen].mean()),
                    accuracy=float(right[chosen].mean()),
                )
            )
    error = sum(one.rows * abs(one.accuracy - one.confidence) for one in bins) / len(right)
    return float(error), bins
