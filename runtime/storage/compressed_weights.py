"""Tensors of an adapter whose bottleneck is stored in 8 or 4 bits (docs/concepts/file-formats.md).

A row of the bottleneck is one dimension of it: a row of ``down``, and a column of ``up``. Biases, a soft prompt and a
head stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.storage.mmap import Bytes
from adalink.runtime.storage.quantized_rows import decode_rows, encode_rows
from adalink.runtime.storage.safetensors import BYTES, as_float32, raw_tensors

_CODES, _SCALES = ".codes", ".scales"
_DTYPES = {**BYTES, "I8": "i1"}


def is_compressed(name: str) -> bool:
    """Whether a tensor of an adapter is one that is stored in fewer bits."""
    return name.endswith((".down.weight", ".up.weight"))


def by_dimension(name: str, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A matrix of the bottleneck with its dimensions as rows, or such a matrix as it was: ``up`` is transposed."""
    return weight.T if name.endswith(".up.weight") else weight


def encode_compressed(weights: Mapping[str, npt.NDArray[np.float32]], weight_dtype: str) -> dict[str, npt.NDArray[Any]]:
    """The tensors as stored; raises ``ValueError`` if they are not of ``weight_dtype``."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, weight in weights.items():
        if weight_dtype == "float32" or not is_compressed(name):
            tensors[name] = weight
            continue
        try:
            parts = encode_rows(np.ascontiguousarray(by_dimension(name, weight)), weight_dtype)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from error
        tensors |= {f"{name}.{part}": np.ascontiguousarray(tensor) for part, tensor in parts.items()}
    return tensors


def decode_compressed(data: Bytes, weight_dtype: str, hidden_size: int) -> dict[str, npt.NDArray[np.float32]]:
    """Weights of a file that ``encode_compressed`` made; raises ``ValueError``."""
    tensors = raw_tensors(data, _DTYPES)
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(_CODES)
        if name.endswith(_SCALES):
            if name.removesuffix(_SCALES) + _CODES not in tensors:
                raise ValueError(f"tensor {name!r} is without its codes")
        elif is_compressed(stem) != (stem != name):
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, expected codes of the bottleneck's matrices alone")
        elif stem == name:
            if tensor.dtype not in (np.float32, np.float16, np.uint16):
                raise ValueError(f"tensor {name!r} is {tensor.dtype}, expected a floating-point number")
            weights[name] = as_float32(tensor)
        elif stem + _SCALES not in tensors:
            raise ValueError(f"tensor {name!r} is without its scales")
        else:
            try:
                rows = decode_rows(tensor, tensors[stem + _SCALES], hidden_size, weight_dtype)
            except ValueError as error:
                raise ValueError(f"tensor {stem!r}: {error}") from error
            weights[stem] = by_dimension(stem, rows)
    return weights
