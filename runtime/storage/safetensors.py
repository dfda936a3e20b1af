"""Safetensors: tensors as views of a file's bytes, without copies, and aligned files for writing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.storage.mmap import Bytes

_ALIGNMENT_BYTES = 64
# numpy dtype of each embedding dtype; numpy has no bfloat16, so its bits are uint16.
STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Of tensors that are no numbers, such as blocks of quantised rows.
BYTES = {"U8": "u1"}


def view_tensors(data: Bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of a safetensors file by name, as float32; those stored as float32 are views of ``data``.

    Raises ``ValueError`` as ``raw_tensors`` does.
    """
    return {name: as_float32(tensor) for name, tensor in raw_tensors(data).items()}


def raw_tensors(data: Bytes, others: Mapping[str, str] = MappingProxyType({})) -> dict[str, npt.NDArray[Any]]:
    """Tensors of a safetensors file by name, as views of ``data``; bfloat16 is returned as its bits, uint16.

    Args:
        data: the file's bytes.
        others: dtypes to take beside those of floating-point numbers, such as ``BYTES``.

    Raises:
        ValueError: the file is truncated, or not a safetensors file of such tensors.
    """
    start, header = _header(data)
    header.pop("__metadata__", None)
    dtypes = {**_DTYPES, **others}
    tensors, ends = {}, [0]
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        begin, end = _offsets(name, entry)
        if begin != ends[-1]:
            raise ValueError(f"tensor {name!r} begins at {begin}, the one before it ends at {ends[-1]}")
        ends.append(end)
        tensors[name] = _view(name, entry, data[start + begin : start + end], dtypes)
    if start + ends[-1] != len(data):
        raise ValueError(f"its tensors end at {start + ends[-1]}, the file has {len(data)} bytes")
    return tensors


def read_metadata(data: Bytes) -> dict[str, str]:
    """Texts that a safetensors file holds beside its tensors; raises ``ValueError`` as ``raw_tensors``."""
    texts = _header(data)[1].get("__metadata__")
    return {name: text for name, text in texts.items() if isinstance(text, str)} if isinstance(texts, dict) else {}


def aligned_header(header: bytes) -> bytes:
    """Header of a safetensors file: its length and JSON, padded so that tensors are aligned."""
    padded = header + b" " * (-(8 + len(header)) % _ALIGNMENT_BYTES)
    return len(padded).to_bytes(8, "little") + padded


def _header(data: Bytes) -> tuple[int, dict[str, Any]]:
    """The first byte of the tensors, and the entry of each; raises ``ValueError``."""
    if len(data) < 8:
        raise ValueError(f"it has {len(data)} bytes, expected a header length of 8")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        raise ValueError(f"its header claims {start - 8} bytes, the file has {len(data)}")
    try:
        header = json.loads(data[8:start].tobytes())
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return start, header


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]
        if not (_is_size(begin) and _is_size(end) and begin <= end):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the entry of tensor {name!r} has no data_offsets of two whole numbers") from error
    return begin, end


def _is_size(value: Any) -> bool:
    """Whether a JSON value is a whole number of at least 0; in Python ``true`` is a number too."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _view(name: str, entry: Any, data: Bytes, dtypes: Mapping[str, str]) -> npt.NDArray[Any]:
    code, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(code, str) or code not in dtypes:
        raise ValueError(f"tensor {name!r} has dtype {code!r}, expected one of {', '.join(dtypes)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise ValueError(f"tensor {name!r} has shape {shape}, expected a list of sizes")
    try:
        return data.view(dtypes[code]).reshape(shape)
    except (ValueError, OverflowError) as error:  # numpy's sizes have 63 bits, and an array at most 64 of them
        raise ValueError(f"tensor {name!r} has {len(data)} bytes, which are not {code} of shape {shape}") from error


def as_float32(tensor: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Numbers as float32; uint16 are the bits of bfloat16."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float32, copy=False)


def as_stored(numbers: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The inverse: numbers in an embedding dtype, rounded to nearest; bits of bfloat16 pass as they are."""
    if dtype != "bfloat16":
        return numbers.astype(STORED[dtype], copy=False)
    if numbers.dtype == np.uint16:
        return numbers
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
