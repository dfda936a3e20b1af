"""Statistics of a study: means, Student's interval, sign-flip test."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence

EXACT_PAIRS = 16
DRAWS = 1 << 16


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation of a sample (divisor ``n - 1``); ``None`` of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def t_interval(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's interval for the mean of paired differences; ``None`` of fewer than two."""
    if len(differences) < 2:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    half = t_quantile(confidence, len(differences) - 1) * deviation / math.sqrt(len(differences))
    return mean - half, mean + half


def t_quantile(confidence: float, degrees: int) -> float:
    """The ``t`` with ``P(|T| < t) = confidence`` for Student's ``T``, by bisection of the exact finite sums."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """``P(|T| < t)`` for Student's ``T`` (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for step in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (step + 1) / (step + 2)
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p-value that paired differences are as likely to be of either sign.

    The share of sign patterns whose sum is at least as far from 0 as the measured one: all of them up to 16 pairs, else
    65,536 drawn with a fixed seed, the measured one counted among them.
    """
    measured = abs(math.fsum(differences)) * (1 - 1e-9)
    if len(differences) <= EXACT_PAIRS:
        patterns = itertools.product((-1, 1), repeat=len(differences))
        sums = [abs(math.fsum(sign * value for sign, value in zip(signs, differences, strict=True)))
                for signs in patterns]  # fmt: skip
        return sum(value >= measured for value in sums) / len(sums)
    draw = random.Random(0)
    extreme = sum(
        abs(math.fsum(value if draw.random() < 0.5 else -value for value in differences)) >= measured
        for _ in range(DRAWS)
    )
    return (extreme + 1) / (DRAWS + 1)
