"""Buffers of a static cache: allocated once, grown by copies, and bound to calls of a session."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError


@dataclass(frozen=True, eq=False)
class BoundCall:
    """A bound call. It keeps its buffers alive, which a binding of ONNX Runtime 1.23 does not."""

    binding: Any
    embeds: Array
    positions: Array
    logits_indices: Array
    logits: Array


def empty_cache(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised KV cache; raises ``RequestError`` if there is no memory for it."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:  # numpy says ValueError of more bytes than an address can count
        size_gb = math.prod(shape) * dtype.itemsize / 1e9
        raise RequestError(
            f"no memory for a KV cache of {shape[1]} rows of {shape[3]} tokens ({size_gb:.1f} GB): send fewer rows, "
            "shorter prompts, or ask for fewer new tokens"
        ) from error


def longer(array: Array, rows: int) -> Array:
    """A copy of an array with ``rows`` rows, zeros at the end."""
    longer = np.zeros((rows, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
