"""Matrices as blocks of small integers, in the layout of ONNX Runtime's ``MatMulNBits``.

A row of ``(N, K)`` is cut into blocks of consecutive weights. Each block has a scale and a zero point:
``weight = (code - zero_point) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ConfigError

Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

_INT8_ACTIVATIONS = 4  # the operator's accuracy_level: activations are rounded to 8 bits, block by block


@dataclass(frozen=True)
class IntegerBlocks:
    """A matrix of shape ``(N, K)``, as the operator stores it.

    Attributes:
        codes: shape ``(N, blocks, block_size * bits / 8)``; of two codes in a byte, the lower four bits come first.
        scales: shape ``(N, blocks)``.
        zero_points: shape ``(N, blocks * bits / 8)``, rounded up; ``None`` if all are the middle code.
        bits: bits of a code, 4 or 8.
        block_size: weights of a block.
        width: ``K``; the last block may be filled up.
    """

    codes: Codes
    scales: Float32
    zero_points: Codes | None
    bits: int
    block_size: int
    width: int

    @property
    def inputs(self) -> dict[str, npt.NDArray[Any]]:
        """The operator's constant inputs, in its order."""
        zero_points = {} if self.zero_points is None else {"zero_points": self.zero_points}
        return {"codes": self.codes, "scales": self.scales, **zero_points}

    @property
    def attributes(self) -> dict[str, int]:
        """The operator's attributes."""
        size = {"K": self.width, "N": len(self.codes), "bits": self.bits, "block_size": self.block_size}
        return size | {"accuracy_level": _INT8_ACTIVATIONS}


def round_to_nearest(matrix: Float32, bits: int, block_size: int) -> IntegerBlocks:
    """Quantise a matrix of shape ``(K, N)`` with ONNX Runtime's own kernel.

    Raises:
        ConfigError: the installed ONNX Runtime has no such kernel.
    """
    from onnxruntime.capi import _pybind_state as kernels

    rows, columns = matrix.shape
    blocks = -(-rows // block_size)
    padded = np.ascontiguousarray(np.pad(matrix, ((0, blocks * block_size - rows), (0, 0))))
    codes = np.zeros((columns, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((columns, blocks), np.float32)
    zero_points = np.zeros((columns, -(-blocks * bits // 8)), np.uint8)
    require_bits(bits)
    kernel = getattr(kernels, f"quantize_matmul_{bits}bits")
    kernel(codes, padded, scales, zero_points, block_size, columns, rows, False)  # False: not symmetric
    return IntegerBlocks(codes, scales, zero_points, bits, block_size, rows)


def require_bits(bits: int) -> None:
    """Check that the installed ONNX Runtime multiplies with matrices in so many bits; raises ``ConfigError``."""
    from onnxruntime.capi import _pybind_state as kernels

    if not hasattr(kernels, f"quantize_matmul_{bits}bits"):
        raise ConfigError(f"the installed ONNX Runtime has no matrices in {bits} bits: pip install 'onnxruntime>=1.22'")


def pack(codes: Codes, scales: Float32, zero_points: Codes, bits: int) -> IntegerBlocks:
    """Blocks of codes and zero points that are one to a byte.

    Args:
        codes: shape ``(N, K)``, whole blocks.
        scales: shape ``(N, blocks)``.
        zero_points: shape ``(N, blocks)``.
        bits: 4 or 8.
    """
    width = codes.shape[1]
    is_middle = bool((zero_points == 1 << bits - 1).all())
    return IntegerBlocks(
        _packed(codes.reshape(*scales.shape, -1), bits),
        scales,
        None if is_middle else _packed(zero_points, bits),
        bits,
        width // scales.shape[1],
        width,
    )


def _packed(codes: Codes, bits: int) -> Codes:
    """Codes of so many bits without gaps, along the last axis."""
    if bits == 8:
        return codes
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return filled[..., ::2] | filled[..., 1::2] << np.uint8(4)
