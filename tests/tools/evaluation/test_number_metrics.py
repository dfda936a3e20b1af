"""Measures of numbers against their formulas in NumPy, and SciPy's permutation test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import permutation_test, rankdata

from adalink.tools.evaluation.number_metrics import error_gain, measure_numbers, sign_flip


@pytest.mark.parametrize("seed", range(3))
def test_errors_and_correlations_by_their_formulas(seed: int) -> None:
    rng = np.random.default_rng(seed)
    right = rng.normal(size=50).round(1)  # ties, which ranks have to share
    said = right + rng.normal(size=50)
    measures = measure_numbers(right.tolist(), said.tolist())
    assert measures.mean_absolute_error.value == pytest.approx(np.abs(said - right).mean())
    assert measures.root_mean_squared_error == pytest.approx(np.sqrt(((said - right) ** 2).mean()))
    assert measures.r2 == pytest.approx(1 - ((said - right) ** 2).sum() / ((right - right.mean()) ** 2).sum())
    assert measures.pearson == pytest.approx(np.corrcoef(right, said)[0, 1])
    assert measures.spearman == pytest.approx(np.corrcoef(rankdata(right), rankdata(said))[0, 1])
    assert measures.mean_absolute_error.low < measures.mean_absolute_error.value < measures.mean_absolute_error.high
    assert measures.points == [(float(one), float(other)) for one, other in zip(right, said, strict=True)]


def test_what_is_not_defined_is_none() -> None:
    constant = measure_numbers([2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert (constant.r2, constant.pearson, constant.spearman) == (None, None, None)
    assert measure_numbers([1.0, 2.0], [3.0, 3.0]).pearson is None
    assert measure_numbers([1.0], [3.0]).r2 is None
    assert len(measure_numbers(list(range(1000)), list(range(1000))).points) == 400


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_permutation_test_as_scipy_does_it(shift: float) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(40), rng.random(40) + shift
    scipy = permutation_test(
        (ours, theirs),
        lambda one, other, axis: np.mean(one - other, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        random_state=np.random.default_rng(0),
    )
    assert sign_flip(ours, theirs) == pytest.approx(scipy.pvalue, abs=0.03)
    gained = error_gain(ours, theirs)
    assert gained.value == pytest.approx((theirs - ours).mean())
    assert gained.low < gained.value < gained.high


def test_equal_errors_are_no_difference() -> None:
    assert sign_flip(np.ones(5), np.ones(5)) == 1.0
