"""Embedding table: the output of the model's embedding module for each token id, mapped from disk."""

from __future__ import annotations

from pathlib import Path

from adalink.runtime.arrays import Array
from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import Bytes, map_file
from adalink.runtime.storage.safetensors import STORED, raw_tensors

TENSOR_NAME = "embeddings"


def open_table(path: Path, base: Base) -> Array:
    """Map the table into memory, read-only.

    Args:
        path: a safetensors file with the one tensor ``embeddings``.
        base: the contract, with the table's shape and dtype.

    Returns:
        Array with shape ``(vocab, d)``; bfloat16 is returned as its bits, uint16.

    Raises:
        IntegrityError: the file is not that table.
    """
    try:
        return view_table(map_file(path), base)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path}: {error}. Export the base again") from error


def view_table(data: Bytes, base: Base) -> Array:
    """The table in a file's bytes, as ``open_table`` returns it; raises ``ValueError`` if it does not match."""
    shape, dtype = (base.vocab_size, base.hidden_size), STORED[base.embedding_dtype]
    expected = f"expected one tensor {TENSOR_NAME!r} of {base.embedding_dtype} with shape {shape}"
    try:
        tensors = raw_tensors(data)
    except ValueError as error:
        raise ValueError(f"{expected}; {error}") from error
    table = tensors.get(TENSOR_NAME)
    if len(tensors) != 1 or table is None or table.shape != shape or table.dtype != dtype:
        contents = [f"{name} of {tensor.dtype} with shape {tensor.shape}" for name, tensor in tensors.items()]
        raise ValueError(f"{expected}; it holds {', '.join(contents) or 'none'}")
    return table
