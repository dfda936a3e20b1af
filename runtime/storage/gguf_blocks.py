"""GGUF block types: rows of blocks, dequantised to the float32 numbers that ggml and gguf-py give, bit for bit.

A block holds its scales as float16 or small integers, and a few bits of each weight. Each formula multiplies and adds
in ggml's order, which decides the last bit. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Blocks = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]

_IQ4_NL = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)


class BlockType(NamedTuple):
    """One block type.

    Attributes:
        kind: its number in a GGUF file.
        weights: weights of a block, consecutive in a row.
        size_bytes: bytes of a block.
        dequantize: from blocks, uint8 ``(blocks, size_bytes)``, to float32 with as many weights.
    """

    kind: int
    weights: int
    size_bytes: int
    dequantize: Callable[[Blocks], Floats]

    def rows(self, data: Blocks) -> Floats:
        """Dequantise rows of blocks, uint8 ``(..., row_bytes)``; returns float32 ``(..., d)``."""
        weights = self.dequantize(data.reshape(-1, self.size_bytes))
        return weights.reshape(*data.shape[:-1], data.shape[-1] // self.size_bytes * self.weights)


class LevelType(NamedTuple):
    """A block type of signed integers with a scale and no minimum: ``weight = level * scale``.

    Attributes:
        bits: bits that hold every level: 4 or 8.
        scaled: weights with one scale.
        read: from blocks to levels, int8 ``(blocks, weights)``, and scales ``(blocks, weights / scaled)``.
    """

    bits: int
    scaled: int
    read: Callable[[Blocks], tuple[Levels, Floats]]

    def dequantize(self, blocks: Blocks) -> Floats:
        """As ``BlockType.dequantize``."""
        levels, scales = self.read(blocks)
        weights = scales[..., None] * levels.reshape(*scales.shape, self.scaled)
        return weights.reshape(len(blocks), -1)


class OffsetType(NamedTuple):
    """A block type of unsigned integers with a scale and an offset: ``weight = number * scale + offset``.

    Attributes:
        scaled: weights with one scale and offset.
        read: from blocks to numbers, uint8 ``(blocks, weights)``, scales ``(blocks, weights / scaled)`` and offsets.
    """

    scaled: int
    read: Callable[[Blocks], tuple[Blocks, Floats, Floats]]

    def dequantize(self, blocks: Blocks) -> Floats:
        """As ``BlockType.dequantize``."""
        numbers, scales, offsets = self.read(blocks)
        weights: Floats = scales[..., None] * numbers.reshape(*scales.shape, self.scaled) + offsets[..., None]
        return weights.reshape(len(blocks), -1)


def _half(blocks: Blocks, start: int) -> Floats:
    """The float16 at byte ``start`` of each block, with shape ``(blocks, 1)``."""
    return blocks[:, start : start + 2].view("<f2").astype(np.float32)


def _nibbles(data: Blocks) -> Blocks:
    """Four-bit numbers of bytes ``(..., n)``: the low ones, then the high ones, ``(..., 2 n)``."""
    return np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=-1)


def _pairs(data: Blocks) -> Blocks:
    """Two-bit numbers of bytes ``(..., n)``, the lowest of all bytes first: ``(..., 4 n)``."""
    return np.concatenate([data >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=-1)


def _bits(data: Blocks) -> Blocks:
    """Single bits of bytes ``(blocks, n)``, the lowest of all bytes first: ``(blocks, 8 n)``."""
    return np.concatenate([data >> np.uint8(shift) & np.uint8(1) for shift in range(8)], axis=-1)


def _q4_0(blocks: Blocks) -> tuple[Levels, Floats]:
    return _nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8), _half(blocks, 0)


def _q4_1(blocks: Blocks) -> tuple[Blocks, Floats, Floats]:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)


def _five_bits(blocks: Blocks, start: int) -> Blocks:
    """Numbers 0 to 31: the fifth bits of all weights lie in the four bytes at ``start``, the others behind them."""
    fifth = np.unpackbits(blocks[:, start : start + 4], axis=-1, bitorder="little")
    return _nibbles(blocks[:, start + 4 :]) | fifth << np.uint8(4)


def _q5_0(blocks: Blocks) -> tuple[Levels, Floats]:
    return _five_bits(blocks, 2).astype(np.int8) - np.int8(16), _half(blocks, 0)


def _q5_1(blocks: Blocks) -> tuple[Blocks, Floats, Floats]:
    return _five_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Blocks) -> tuple[Levels, Floats]:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0)


def _iq4_nl(blocks: Blocks) -> Floats:
    return _half(blocks, 0) * _IQ4_NL[_nibbles(blocks[:, 2:])]


def _q2_k(blocks: Blocks) -> tuple[Blocks, Floats, Floats]:
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    numbers = _pairs(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 256)
    return numbers, _half(blocks, 80) * scales, -(_half(blocks, 82) * minima)


def _q3_k(blocks: Blocks) -> Floats:
    packed = blocks[:, 96:108]
    scales = (_nibbles(packed[:, :8]) | _pairs(packed[:, 8:]) << 4).astype(np.float32) - 32
    third = _bits(blocks[:, :32]).reshape(-1, 16, 16)
    numbers = _pairs(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 16, 16)
    steps = (_half(blocks, 108) * scales)[..., None]
    # A bit that is not set means 4 less.
    return (steps * ((numbers | third << 2).astype(np.float32) - 4)).reshape(-1, 256)


def _six_bit_scales(packed: Blocks) -> tuple[Blocks, Blocks]:
    """Eight scales and eight minima of six bits each, from twelve bytes."""
    low, high, ends = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    two, four, six = np.uint8(2), np.uint8(4), np.uint8(63)
    top, bottom = np.uint8(48), np.uint8(15)
    scales = np.concatenate([low & six, (ends & bottom) | (low >> two & top)], axis=-1)
    return scales, np.concatenate([high & six, (ends >> four) | (high >> two & top)], axis=-1)


def _q4_k(blocks: Blocks) -> tuple[Blocks, Floats, Floats]:
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256), *_six_bit_lines(blocks)


def _q5_k(blocks: Blocks) -> tuple[Blocks, Floats, Floats]:
    low, fifth = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)), _bits(blocks[:, 16:48])
    return low.reshape(-1, 256) | fifth << np.uint8(4), *_six_bit_lines(blocks)


def _six_bit_lines(blocks: Blocks) -> tuple[Floats, Floats]:
    """Scales and offsets of Q4_K and Q5_K."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    return _half(blocks, 0) * scales, -(_half(blocks, 2) * minima)


def _q6_k(blocks: Blocks) -> tuple[Levels, Floats]:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _pairs(blocks[:, 128:192].reshape(-1, 2, 32)).reshape(-1, 256)
    levels = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    return levels, _half(blocks, 208) * blocks[:, 192:208].view(np.int8)


LEVEL_TYPES = {
    "Q4_0": LevelType(4, 32, _q4_0),
    "Q5_0": LevelType(8, 32, _q5_0),
    "Q8_0": LevelType(8, 32, _q8_0),
    "Q6_K": LevelType(8, 16, _q6_k),
}
OFFSET_TYPES = {
    "Q4_1": OffsetType(32, _q4_1),
    "Q5_1": OffsetType(32, _q5_1),
    "Q2_K": OffsetType(16, _q2_k),
    "Q4_K": OffsetType(32, _q4_k),
    "Q5_K": OffsetType(32, _q5_k),
}
BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18, LEVEL_TYPES["Q4_0"].dequantize),
    "Q4_1": BlockType(3, 32, 20, OFFSET_TYPES["Q4_1"].dequantize),
    "Q5_0": BlockType(6, 32, 22, LEVEL_TYPES["Q5_0"].dequantize),
    "Q5_1": BlockType(7, 32, 24, OFFSET_TYPES["Q5_1"].dequantize),
    "Q8_0": BlockType(8, 32, 34, LEVEL_TYPES["Q8_0"].dequantize),
    "Q2_K": BlockType(10, 256, 84, OFFSET_TYPES["Q2_K"].dequantize),
    "Q3_K": BlockType(11, 256, 110, _q3_k),
    "Q4_K": BlockType(12, 256, 144, OFFSET_TYPES["Q4_K"].dequantize),
    "Q5_K": BlockType(13, 256, 176, OFFSET_TYPES["Q5_K"].dequantize),
    "Q6_K": BlockType(14, 256, 210, LEVEL_TYPES["Q6_K"].dequantize),
    "IQ4_NL": BlockType(20, 32, 18, _iq4_nl),
}
