"""Embedding table: the output of the model's embedding module for each token id, mapped from disk.

Rows lie there as the checkpoint has them, in 16 bits or in GGUF blocks, where that is smaller. A row is expanded when
it is looked up; the whole table is in memory nowhere (docs/decisions/0022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import Bytes, map_file
from adalink.runtime.storage.safetensors import BYTES, STORED, as_float32, as_stored, raw_tensors
from adalink.runtime.storage.table_schema import HeadCodes, TableStorage

TENSOR_NAME = "embeddings"


class EmbeddingTable:
    """Rows of the embedding table; safe for several threads.

    Attributes:
        shape: ``(vocab, d)``.
        dtype: numpy dtype of a row, that of the base; bfloat16 is returned as its bits, uint16.
        parts: rows as they are stored; of codes, these and their scales.
    """

    def __init__(
        self, stored: Array, dtype: str, storage: TableStorage | None = None, scales: Array | None = None
    ) -> None:
        """Wrap a stored table.

        Args:
            stored: rows as they are stored: of ``dtype``, of ``storage``'s 16 bits, or bytes of its blocks; codes have
                shape ``(vocab, blocks, block_size)``.
            dtype: the base's embedding dtype.
            storage: how rows are stored, if not in ``dtype``.
            scales: of codes, float32 ``(vocab, blocks)``.
        """
        self.parts = (stored,) if scales is None else (stored, scales)
        self._dtype, self._storage = dtype, storage
        self.dtype = np.dtype(STORED[dtype])
        blocks = None if storage is None else BLOCK_TYPES.get(storage.encoding)
        row_size = int(np.prod(stored.shape[1:]))
        self.shape = (len(stored), row_size if blocks is None else row_size // blocks.size_bytes * blocks.weights)
        self._decode: Callable[..., npt.NDArray[np.float32]] = as_float32
        if scales is not None:
            self._decode = _dequantize
        elif blocks is not None:
            self._decode = blocks.rows

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, ids: Array) -> Array:
        """Embeddings of token ids, as a new array with shape ``(*ids.shape, d)``."""
        return self._expand(*(part.take(ids, axis=0) for part in self.parts))

    def block(self, first: int, last: int) -> Array:
        """Embeddings of the ids from ``first`` up to ``last``, not to be changed, with shape ``(last - first, d)``."""
        return self._expand(*(part[first:last] for part in self.parts))

    def stored_block(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Likewise rows of the embedding matrix: float32 numbers before the module's scale."""
        return self._decode(*(part[first:last] for part in self.parts))

    def _expand(self, *parts: Array) -> Array:
        if self._storage is None:
            return parts[0]
        rows = self._decode(*parts)
        if self._storage.scale != 1:
            rows = rows * np.float32(self._storage.scale)  # float32 rows are the file's own bytes
        return as_stored(rows, self._dtype)


def _dequantize(codes: Array, scales: Array) -> npt.NDArray[np.float32]:
    """Rows of codes ``(..., blocks, block_size)`` and their scales ``(..., blocks)``."""
    weights: npt.NDArray[np.float32] = (codes.astype(np.float32) - 128) * scales[..., None]
    return weights.reshape(*scales.shape[:-1], -1)


def open_table(path: Path, base: Base) -> EmbeddingTable:
    """Map the table into memory, read-only.

    Args:
        path: a safetensors file with the one tensor ``embeddings``, or external data with the rows or the codes of a
            tied head.
        base: the contract, with the table's shape, dtype and storage.

    Raises:
        IntegrityError: the file is not that table.
    """
    try:
        data = map_file(path)
        if base.table is not None and base.table.head is not None:
            return _view_codes(data, base, base.table, base.table.head)
        if base.table is not None and base.table.rows_start is not None:
            return _view_rows(data, base, base.table, base.table.rows_start)
        return EmbeddingTable(view_table(data, base, base.table), base.embedding_dtype, base.table)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: {error}. Export the base again") from error


def _view_codes(data: Bytes, base: Base, storage: TableStorage, head: HeadCodes) -> EmbeddingTable:
    """The table in a head's codes; raises ``ValueError`` if the data are too short."""
    shape = (base.vocab_size, base.hidden_size // head.block_size)
    count = math.prod(shape)
    codes = data[head.codes_start :][: count * head.block_size].reshape(*shape, head.block_size)
    scales = data[head.scales_start :][: 4 * count].view("<f4").reshape(shape)
    return EmbeddingTable(codes, base.embedding_dtype, storage, scales)


def _view_rows(data: Bytes, base: Base, storage: TableStorage, start: int) -> EmbeddingTable:
    """The table in a head's rows; raises ``ValueError`` if the data are too short."""
    dtype = np.dtype(STORED[storage.encoding])
    shape = (base.vocab_size, base.hidden_size)
    rows = data[start:][: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return EmbeddingTable(rows, base.embedding_dtype, storage)


def view_table(data: Bytes, base: Base, storage: TableStorage | None = None) -> Array:
    """The rows of a table in a file's bytes, as they are stored; raises ``ValueError`` if it does not match."""
    dtype, width = stored_row(base, storage)
    shape = (base.vocab_size, width)
    expected = f"expected one tensor {TENSOR_NAME!r} of {dtype} with shape {shape}"
    try:
        tensors = raw_tensors(data, BYTES)
    except ValueError as error:
        raise ValueError(f"{expected}; {error}") from error
    table = tensors.get(TENSOR_NAME)
    if len(tensors) != 1 or table is None or table.shape != shape or table.dtype != STORED.get(dtype, "u1"):
        contents = [f"{name} of {tensor.dtype} with shape {tensor.shape}" for name, tensor in tensors.items()]
        raise ValueError(f"{expected}; it holds {', '.join(contents) or 'none'}")
    return table


def stored_row(base: Base, storage: TableStorage | None) -> tuple[str, int]:
    """Dtype of a stored row and its length: ``"uint8"`` and bytes for blocks, else ``d`` numbers."""
    encoding = base.embedding_dtype if storage is None else storage.encoding
    if encoding not in BLOCK_TYPES:
        return encoding, base.hidden_size
    blocks = BLOCK_TYPES[encoding]
    return "uint8", base.hidden_size // blocks.weights * blocks.size_bytes
