"""The statistics of a study against published tables and counts by hand."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from studies.report.statistics import (
    DRAWS,
    EXACT_PAIRS,
    mean_and_deviation,
    sign_flip_test,
    t_interval,
    t_probability,
    t_quantile,
)


# Student's table, two-sided.
@pytest.mark.parametrize(
    ("confidence", "degrees", "wanted"),
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.95, 9, 2.262), (0.95, 10, 2.228),
     (0.95, 30, 2.042), (0.99, 2, 9.925), (0.9, 5, 2.015), (0.95, 10000, 1.960)],
)  # fmt: skip
def test_quantiles_are_those_of_the_table(confidence, degrees, wanted):
    assert t_quantile(confidence, degrees) == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7, 20])
def test_probability_is_the_integral_of_the_density(degrees):
    x = np.linspace(-1.7, 1.7, 200_001)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    integral = np.trapezoid(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2), x)
    assert t_probability(1.7, degrees) == pytest.approx(integral, abs=1e-8)


def test_interval_by_hand():
    # mean 2, deviation 1, n = 3: 2 ± 4.3027 / sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert t_interval([1.0]) is None
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)


def test_mean_and_deviation_are_numpys():
    values = [0.25, 0.5, 0.875, 0.125]
    assert mean_and_deviation(values) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert mean_and_deviation([0.5]) == (0.5, None)


def test_sign_flips_by_hand():
    # Of 8 patterns of 1, 2, 3 only +++ and --- reach 6; of 1, 2, -3 all do, as its own sum is 0.
    assert sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip_test([0.1, 0.1, 0.1, -0.1]) == 10 / 16  # |sum| >= 0.2: 1 + 4 + 4 + 1
    assert sign_flip_test([-0.5] * 10) == 2 / 1024
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert sign_flip_test([0.5] * EXACT_PAIRS) == 2 / 2**16  # the last number that is counted, not drawn


def test_many_pairs_are_drawn():
    draw = random.Random(4)
    values = [draw.gauss(0.1, 1.0) for _ in range(17)]
    found = abs(sum(values))
    exact = np.mean([abs(np.dot(signs, values)) >= found for signs in itertools.product((-1, 1), repeat=17)])
    assert 0.05 < exact < 0.95
    assert sign_flip_test(values) == pytest.approx(exact, abs=0.01)


def test_a_drawn_p_value_is_never_zero():
    """All 40 of one sign: the pattern that was found is counted, and none that is drawn reaches it."""
    assert sign_flip_test([0.5] * 40) == 1 / (DRAWS + 1)


@pytest.mark.parametrize("seed", range(6))
def test_sums_that_tie_in_decimals_tie(seed):
    """Differences of accuracies are no binary fractions; counted in whole numbers, ties are exact."""
    draw = random.Random(seed)
    hundredths = [draw.randint(-9, 12) for _ in range(9)]
    patterns = itertools.product((-1, 1), repeat=len(hundredths))
    sums = [abs(sum(sign * value for sign, value in zip(signs, hundredths, strict=True))) for signs in patterns]
    expected = sum(value >= abs(sum(hundredths)) for value in sums) / len(sums)
    assert sign_flip_test([0.5 + value / 100 - 0.5 for value in hundredths]) == expected
