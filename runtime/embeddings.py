"""The embedding table: what the model's embedding module returns for each token id, read from disk as needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from adalink.runtime.engine import Array
from adalink.runtime.errors import IntegrityError
from adalink.runtime.manifest import Base

TENSOR_NAME = "embeddings"
_STORED = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}
_MAX_HEADER_BYTES = 1 << 20


def open_table(path: Path, base: Base) -> Array:
    """Map the table into memory, read-only.

    Args:
        path: a safetensors file with the one tensor ``embeddings``.
        base: the contract its shape and dtype must match.

    Returns:
        Array with shape ``(vocab, d)``; bfloat16 is given as its bits, uint16.

    Raises:
        IntegrityError: the file is not that table.
    """
    code, dtype = _STORED[base.embedding_dtype]
    shape = (base.vocab_size, base.hidden_size)
    expected = f"one tensor {TENSOR_NAME!r} of {code} with shape {shape}"
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes")
            entry = json.loads(stream.read(length))[TENSOR_NAME]
        begin, end = entry["data_offsets"]
        if entry["dtype"] != code or tuple(entry["shape"]) != shape:
            raise ValueError(f"it holds {entry['dtype']} with shape {tuple(entry['shape'])}")
        if end - begin != shape[0] * shape[1] * np.dtype(dtype).itemsize:
            raise ValueError(f"it holds {end - begin} bytes")
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=8 + length + begin, shape=shape)
        return mapped.view(np.ndarray)  # rows taken from it are plain arrays too, and quicker to take
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: expected {expected}; {error}. Export the base again") from error
