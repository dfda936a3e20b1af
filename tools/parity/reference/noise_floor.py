"""The noise floor and the tolerance derived from it (docs/concepts/parity.md, "the noise floor").

A transformer has no useful a-priori error bound, so the noise floor is measured: the difference between PyTorch float32
and float64 on the same prompts, per position. The tolerance is 16 x max(noise at this position, 90th percentile over
all positions). The percentile keeps positions with accidentally tiny noise from causing false failures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from adalink.export.adapter.error_bound import UNIT_ROUNDOFF, Float64
from adalink.runtime.arrays import Array

# Tolerance of a float32 engine, in multiples of the noise.
NOISE_FACTOR = 16.0
# Likewise for rounded activations, in multiples of what rounding them changes in PyTorch.
ACTIVATIONS_FACTOR = 3.0
# Float32's noise as a share of the outputs' size (rms), at most. It is a ten-thousandth or less, and 1 or more between
# two models.
MOST_NOISE = 0.01
# The percentile over all positions that is called the typical noise.
TYPICAL_PERCENTILE = 90
# Positions that are in memory in float64 at once: a vocabulary may be large.
_POSITIONS = 8


@dataclass(frozen=True)
class Outputs:
    """Outputs of one row, with shapes ``(seq, vocab)`` or ``(seq, d)``, and their noise.

    Attributes:
        values: the float32 model's outputs by name, in float32.
        noise: by name, the noise at each position, ``(seq,)``: the largest deviation of the float32 model from the
            float64 model, or from itself with rounded activations.
    """

    values: dict[str, Float64]
    noise: dict[str, Float64]


def limit_of(noise: Float64, typical: float, dtype: str) -> Float64:
    """Tolerance at each position.

    Args:
        noise: float32's noise at each position.
        typical: its ``TYPICAL_PERCENTILE`` over all positions.
        dtype: the engine's; the tolerance grows with its unit roundoff.
    """
    scale = UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF["float32"]
    return np.asarray(NOISE_FACTOR * scale * np.maximum(noise, typical))


def noise_of(single: dict[str, Array], double: dict[str, Array]) -> dict[str, Float64]:
    """Noise of the float32 model's outputs at each position.

    It is NaN where it is more than rounding: one of the two models is another then, and NaN passes no check.
    """
    most = {name: MOST_NOISE * root_mean_square(values) for name, values in single.items()}
    noise = deviations(single, double).items()
    return {name: np.where(values <= most[name], values, np.nan) for name, values in noise}


def deviations(ours: dict[str, Array], theirs: dict[str, Array]) -> dict[str, Float64]:
    """Largest deviation at each position, by output."""
    return {name: largest_deviations(value, theirs[name]) for name, value in ours.items()}


def largest_deviations(ours: Array, theirs: Array) -> Float64:
    """Largest deviation at each position of ``(positions, numbers)``, in float64."""
    assert ours.shape == theirs.shape
    return np.array([largest for one, other in widened(ours, theirs) for largest in np.abs(one - other).max(axis=1)])


def root_mean_square(values: Array) -> float:
    """Of all numbers, computed in float64."""
    return float(np.sqrt(sum(float(np.square(rows).sum()) for (rows,) in widened(values)) / values.size))


def widened(*arrays: Array) -> Iterator[tuple[Float64, ...]]:
    """Some positions of arrays of ``(positions, numbers)`` at a time, widened."""
    for start in range(0, len(arrays[0]), _POSITIONS):
        yield tuple(array[start : start + _POSITIONS].astype(np.float64) for array in arrays)
