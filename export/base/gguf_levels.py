"""Blocks of a GGUF file's tensors: signed integers with one scale, read from the file's bytes.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Types whose blocks have a minimum beside the
scale are not here: ONNX Runtime's integer kernels have no place for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.int8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LevelType:
    """A ggml type of signed integers: ``weight = level * scale``.

    Attributes:
        bytes: bytes of a group of weights, the unit of the file.
        bits: bits that hold every level, as the operator counts them: 4 or 8.
        block_size: weights with one scale.
        read: from groups of shape ``(n, bytes)`` to levels ``(n, weights)`` and scales ``(n, blocks)``.
    """

    bytes: int
    bits: int
    block_size: int
    read: Callable[[Bytes], tuple[Levels, Float32]]


def _halves(data: Bytes) -> Bytes:
    """The lower four bits of all bytes of the last axis, then the upper four."""
    return np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)


def _half_floats(data: Bytes) -> Float32:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _read_q4_0(groups: Bytes) -> tuple[Levels, Float32]:
    return _halves(groups[:, 2:]).astype(np.int8) - np.int8(8), _half_floats(groups[:, :2])


def _read_q5_0(groups: Bytes) -> tuple[Levels, Float32]:
    fifth = np.unpackbits(groups[:, 2:6], axis=1, bitorder="little")
    levels = (_halves(groups[:, 6:]) | fifth << np.uint8(4)).astype(np.int8) - np.int8(16)
    return levels, _half_floats(groups[:, :2])


def _read_q8_0(groups: Bytes) -> tuple[Levels, Float32]:
    return groups[:, 2:].astype(np.uint8).view(np.int8), _half_floats(groups[:, :2])


def _read_q6_k(groups: Bytes) -> tuple[Levels, Float32]:
    count = len(groups)
    low = _halves(groups[:, :128].reshape(count, 2, 64))
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = groups[:, 128:192].reshape(count, 2, 1, 32) >> shifts & np.uint8(3)
    levels = (low | high.reshape(count, 2, 128) << np.uint8(4)).astype(np.int8) - np.int8(32)
    scales = groups[:, 192:208].astype(np.uint8).view(np.int8).astype(np.float32) * _half_floats(groups[:, 208:])
    return levels.reshape(count, 256), scales


LEVEL_TYPES = {
    "Q4_0": LevelType(18, 4, 32, _read_q4_0),
    "Q5_0": LevelType(22, 8, 32, _read_q5_0),
    "Q8_0": LevelType(34, 8, 32, _read_q8_0),
    "Q6_K": LevelType(210, 8, 16, _read_q6_k),
}
