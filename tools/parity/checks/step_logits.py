"""Logits of generated rows, in a temporary file until they are compared.

Rows of a mixed batch wait until their task's adapter is attached to PyTorch. With a large vocabulary those of one step
are megabytes, and a parity run has hundreds of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.tools.parity.checks.adapter import as_numbers


class LogitsFile:
    """Logits of a vocabulary's size, each in its place. The file goes with the last one that reads it."""

    def __init__(self, dtype: str) -> None:
        """A file for logits of an engine, in the base's dtype."""
        self._dtype = dtype
        self._file = tempfile.TemporaryFile(prefix="adalink-")  # noqa: SIM115 - open as long as its rows are known

    def add(self, logits: Array) -> Place:
        """Write the logits of one step, shape ``(vocab,)``."""
        offset = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(logits).data)
        return Place(offset, logits.size, logits.dtype.str)

    def read(self, place: Place) -> Array:
        """Read what was written to a place, as floating-point numbers."""
        self._file.seek(place.offset)
        dtype = np.dtype(place.dtype)
        return as_numbers(np.frombuffer(self._file.read(place.size * dtype.itemsize), dtype), self._dtype)


@dataclass(frozen=True)
class Place:
    """Where logits lie in a file: their first byte, how many they are and their dtype."""

    offset: int
    size: int
    dtype: str


class StepLogits:
    """Logits of the steps of one row; a slice reads them, shape ``(steps, vocab)``."""

    def __init__(self, file: LogitsFile, places: Sequence[Place]) -> None:
        self._file, self._places = file, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, steps: slice) -> Array:
        return np.stack([self._file.read(place) for place in self._places[steps]])

    def first(self, count: int) -> StepLogits:
        """Those of the first steps."""
        return StepLogits(self._file, self._places[:count])
