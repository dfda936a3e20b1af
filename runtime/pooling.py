"""Pooling: the hidden states of a text become one vector, as in sentence-transformers. Sums are in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array

# What sentence-transformers (PyTorch) divides by at least.
_LEAST_LENGTH = 1e-12


def pool(states: Array, modes: Sequence[str], skip: int = 0, *, normalize: bool = False) -> npt.NDArray[np.float32]:
    """One vector of the states of one text.

    Args:
        states: hidden states of its tokens, without padding, floats of shape ``(tokens, d)``.
        modes: some of ``adalink.runtime.storage.pooling_schema.POOLING_MODES``; their vectors are concatenated.
        skip: tokens at the beginning that are left out: a prompt's. Weights still count from the first token.
        normalize: whether the vector is divided by its length.

    Returns:
        Shape ``(len(modes) * d,)``.
    """
    exact = states.astype(np.float64)
    weights = np.arange(1, len(exact) + 1, dtype=np.float64)
    vector = np.concatenate([_MODES[mode](exact[skip:], weights[skip:]) for mode in modes])
    if normalize:
        vector = vector / max(float(np.sqrt(vector @ vector)), _LEAST_LENGTH)
    return vector.astype(np.float32)


def _weighted_mean(states: Array, weights: Array) -> Array:
    return np.asarray(weights @ states / weights.sum())


_MODES: dict[str, Callable[[Array, Array], Array]] = {
    "cls": lambda states, _: states[0],
    "max": lambda states, _: states.max(axis=0),
    "mean": lambda states, _: states.mean(axis=0),
    "mean_sqrt_len_tokens": lambda states, _: states.sum(axis=0) / np.sqrt(len(states)),
    "weightedmean": _weighted_mean,
    "lasttoken": lambda states, _: states[-1],
}
