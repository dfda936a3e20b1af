"""Measures of answers that are numbers: by scikit-learn and SciPy, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adalink.tools.evaluation.metrics import RESAMPLES, SEED, Numbers
from adalink.tools.evaluation.report import Estimate, NumberMeasures

_MOST_POINTS = 400


def measure_numbers(expected: Sequence[float], given: Sequence[float]) -> NumberMeasures:
    """Errors and correlations; those that are not defined, as where all numbers are one, are ``None``."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    right, said = np.array(expected, np.float64), np.array(given, np.float64)
    varies = len(right) > 1 and np.ptp(right) > 0
    correlates = varies and np.ptp(said) > 0
    chosen = np.unique(np.linspace(0, len(right) - 1, min(len(right), _MOST_POINTS), dtype=int))
    return NumberMeasures(
        mean_absolute_error=_mean(np.abs(said - right), float(mean_absolute_error(right, said))),
        root_mean_squared_error=float(root_mean_squared_error(right, said)),
        r2=float(r2_score(right, said)) if varies else None,
        pearson=float(pearsonr(right, said).statistic) if correlates else None,
        spearman=float(spearmanr(right, said).statistic) if correlates else None,
        points=[(float(right[index]), float(said[index])) for index in chosen],
    )


def _mean(values: Numbers, value: float) -> Estimate:
    """A mean with a seeded bootstrap interval."""
    low, high = np.quantile(_means(values), [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def error_gain(ours: Numbers, theirs: Numbers) -> Estimate:
    """How much smaller our errors are in the mean than theirs on the same rows, with a paired bootstrap interval."""
    difference = theirs - ours
    return _mean(difference, float(difference.mean()))


def sign_flip(ours: Numbers, theirs: Numbers) -> float:
    """Two-sided p-value of a paired permutation test of the mean difference of two errors, seeded.

    If both were equally good, each row's difference might as well have the other sign.
    """
    difference = theirs - ours
    rng, least = np.random.default_rng(SEED), abs(difference.sum()) * (1 - 1e-12)
    flipped = [abs((difference * rng.choice((-1.0, 1.0), len(difference))).sum()) for _ in range(RESAMPLES)]
    return float(1 + sum(total >= least for total in flipped)) / (1 + RESAMPLES)


def _means(values: Numbers) -> list[float]:
    rng = np.random.default_rng(SEED)
    return [float(values[rng.integers(0, len(values), len(values))].mean()) for _ in range(RESAMPLES)]
