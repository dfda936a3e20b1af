"""Matrices whose rows are whole numbers times one scale, in 8 or 4 bits: how compressed adapters are stored.

Row ``k`` is ``codes[k] * scales[k]``, symmetric about 0. A scale has 12 significant bits, so that the product is exact
in float32, and so that the numbers alone tell codes and scale: they are stored again as they were.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.storage.adapter_spec import WEIGHT_BITS

Matrix = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

_SCALE_BITS = 12
# Rows of smaller numbers are 0: their scale could not have as many bits.
_SMALLEST_SCALE = 2.0**-100


def round_rows(matrix: Matrix, weight_dtype: str) -> Matrix:
    """The nearest matrix that can be stored in ``weight_dtype``; float32 with shape ``(rows, columns)``."""
    return _multiply(*quantize_rows(matrix, weight_dtype))


def quantize_rows(matrix: Matrix, weight_dtype: str) -> tuple[Codes, Matrix]:
    """Codes and scales of a matrix.

    Args:
        matrix: float32, shape ``(rows, columns)``.
        weight_dtype: ``"int8"`` or ``"int4"``.

    Returns:
        Codes, int8 with the matrix' shape, from -127 to 127, or from -7 to 7; and scales, float32 ``(rows, 1)``.
    """
    largest_code = largest(weight_dtype)
    peaks = np.abs(matrix).max(axis=1, keepdims=True, initial=0.0).astype(np.float64)
    fraction, exponent = np.frexp(peaks / largest_code)
    exact = np.ldexp(np.rint(np.ldexp(fraction, _SCALE_BITS)), exponent - _SCALE_BITS)
    scales = np.where(exact < _SMALLEST_SCALE, 0.0, exact).astype(np.float32)
    steps = matrix / np.where(scales > 0, scales, 1).astype(np.float64)
    return np.clip(np.rint(steps), -largest_code, largest_code).astype(np.int8), scales


def encode_rows(matrix: Matrix, weight_dtype: str) -> dict[str, npt.NDArray[Any]]:
    """Stored tensors of a matrix that ``round_rows`` made, by the end of their names.

    Raises:
        ValueError: its numbers are not those of ``weight_dtype``.
    """
    codes, scales = quantize_rows(matrix, weight_dtype)
    if not np.array_equal(_multiply(codes, scales), matrix):
        raise ValueError(f"its rows are not {weight_dtype} codes times one scale")
    stored = codes if weight_dtype == "int8" else _pack(codes)
    return {"codes": stored, "scales": scales[:, 0]}


def decode_rows(codes: npt.NDArray[Any], scales: npt.NDArray[Any], columns: int, weight_dtype: str) -> Matrix:
    """The matrix of stored tensors, float32 with shape ``(rows, columns)``.

    Raises:
        ValueError: they are no such tensors, or the matrix would be stored as others.
    """
    width = columns if weight_dtype == "int8" else -(-columns // 2)
    dtype = np.dtype(np.int8 if weight_dtype == "int8" else np.uint8)
    if codes.dtype != dtype or codes.ndim != 2 or codes.shape[1] != width:
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}, expected {dtype} of (rows, {width})")
    if scales.dtype != np.float32 or scales.shape != (len(codes),):
        raise ValueError(f"scales are {scales.dtype} of shape {scales.shape}, expected float32 of ({len(codes)},)")
    numbers = codes if weight_dtype == "int8" else _unpack(codes, columns)
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = _multiply(numbers, scales[:, None])
    if not np.isfinite(matrix).all():
        raise ValueError("scales are not finite")
    again, again_scales = quantize_rows(matrix, weight_dtype)
    if not (np.array_equal(again, numbers) and np.array_equal(again_scales[:, 0], scales)):
        raise ValueError(f"codes and scales are not those of {weight_dtype} rows as this kit writes them")
    return matrix


def largest(weight_dtype: str) -> int:
    """The largest code, 127 or 7: codes are symmetric."""
    return int(2 ** (WEIGHT_BITS[weight_dtype] - 1)) - 1


def _multiply(codes: Codes, scales: Matrix) -> Matrix:
    return codes.astype(np.float32) * scales


def _pack(codes: Codes) -> npt.NDArray[np.uint8]:
    """Two codes a byte, the first in the low four bits, each plus 8; an odd row ends with a 0."""
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    shifted = (padded + 8).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = np.bitwise_or(shifted[:, 0::2], shifted[:, 1::2] << 4).astype(np.uint8)
    return packed


def _unpack(packed: npt.NDArray[np.uint8], columns: int) -> Codes:
    pairs = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    codes = pairs.astype(np.int8) - np.int8(8)
    if columns % 2 and codes[:, -1].any():
        raise ValueError("the padding of its rows is not 0")
    return codes[:, :columns]
