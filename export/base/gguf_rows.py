"""Rows of a graph's matrices in the tensors of a GGUF file, found by value.

So neither names nor layouts matter: rows may be permuted, merged or turned, and a head may be the embeddings once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from adalink.export.base.integer_blocks import Float32
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.gguf_blocks import Blocks
from adalink.training.models.gguf.header import TensorPlace, read_header

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_CHUNK_ROWS = 4096


class RowsOfTensor(NamedTuple):
    """Rows of a matrix that one tensor holds.

    Attributes:
        tensor: the tensor.
        rows: which rows of the matrix.
        places: their numbers in the tensor.
    """

    tensor: FileMatrix
    rows: Places
    places: Places


@dataclass(frozen=True, eq=False)
class FileMatrix:
    """A tensor with two axes.

    Attributes:
        name: its name in the file.
        type: its ggml type, such as ``"Q4_0"``.
        width: numbers of a row.
        data: its bytes, shape ``(rows, bytes)``, mapped.
    """

    name: str
    type: str
    width: int
    data: Blocks

    def values(self, rows: slice) -> Float32:
        """Some of its rows as numbers."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return np.asarray(dequantize(np.ascontiguousarray(self.data[rows]), GGMLQuantizationType[self.type]))


class GgufRows:
    """The rows of all matrices of a GGUF file.

    Attributes:
        name: the file's name.
        tensors: its matrices.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises ``ModelError``."""
        self.name = path.name
        data = np.memmap(path, np.uint8, "r")
        places = read_header(path).tensors
        self.tensors = [_matrix(name, place, data) for name, place in places.items() if len(place.shape) == 2]

    def find(self, matrix: Float32, product: str) -> Iterator[RowsOfTensor]:
        """The tensors that a matrix has its rows from; of equal rows, in that with the most of its others.

        Args:
            matrix: shape ``(N, K)``.
            product: name of what multiplies with it, for messages.

        Raises:
            GraphError: a row is in none.
        """
        keys, index = self._keys(matrix), self._index
        left = np.ones(len(keys), bool)
        for number in index.owners(keys):
            tensor = self.tensors[number]
            places = index.places(number, keys)
            rows = np.flatnonzero(left & (places >= 0))
            if rows.size and tensor.width == matrix.shape[1]:
                left[rows] = False
                yield RowsOfTensor(tensor, rows, places[rows])
        if left.any():
            raise GraphError(
                f"{product}: {left.sum()} of its matrix's {len(left)} rows are in no tensor of {self.name}, so that "
                "codes cannot be kept: export it with --quantize int8"
            )

    @cached_property
    def _index(self) -> _Index:
        return _Index([self._keys_of(tensor) for tensor in self.tensors])

    @cached_property
    def _factors(self) -> Keys:
        width = max(tensor.width for tensor in self.tensors)
        factors: Keys = np.random.default_rng(0).integers(0, 2**64, width, np.uint64)
        return np.bitwise_or(factors, np.uint64(1))

    def _keys_of(self, tensor: FileMatrix) -> Keys:
        starts = range(0, len(tensor.data), _CHUNK_ROWS)
        return np.concatenate([self._keys(tensor.values(slice(start, start + _CHUNK_ROWS))) for start in starts])

    def _keys(self, matrix: Float32) -> Keys:
        """A number for each row, equal for equal rows; -0 is 0."""
        factors = self._factors[: matrix.shape[1]]
        chunks = [matrix[start : start + _CHUNK_ROWS] + np.float32(0) for start in range(0, len(matrix), _CHUNK_ROWS)]
        words = (np.ascontiguousarray(chunk).view(np.uint32).astype(np.uint64) for chunk in chunks)
        return np.concatenate([chunk @ factors for chunk in words])


class _Index:
    """Where each key is."""

    def __init__(self, keys: list[Keys]) -> None:
        """Sort the keys of each tensor's rows."""
        self._orders = [np.argsort(part, kind="stable") for part in keys]
        self._sorted = [part[order] for part, order in zip(keys, self._orders, strict=True)]
        every = np.concatenate(keys)
        order = np.argsort(every, kind="stable")
        self._every = every[order]
        self._owners = np.repeat(np.arange(len(keys)), [len(part) for part in keys])[order]

    def owners(self, keys: Keys) -> list[int]:
        """Tensors that hold some of these keys, the one with most first."""
        places = np.minimum(np.searchsorted(self._every, keys), len(self._every) - 1)
        held = self._owners[places][self._every[places] == keys]
        return [number for number, _ in Counter(held.tolist()).most_common()]

    def places(self, number: int, keys: Keys) -> Places:
        """Row of each key in a tensor; -1 where it is not there."""
        own = self._sorted[number]
        places = np.minimum(np.searchsorted(own, keys), len(own) - 1)
        return np.where(own[places] == keys, self._orders[number][places], -1)


def _matrix(name: str, place: TensorPlace, data: Blocks) -> FileMatrix:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(place.kind)
    group, size = GGML_QUANT_SIZES[kind]
    rows, width = place.shape
    row_bytes = width // group * size
    return FileMatrix(name, kind.name, width, data[place.start : place.start + rows * row_bytes].reshape(rows, -1))
