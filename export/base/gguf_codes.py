"""Matrices of a graph as the codes of the GGUF file that its model was loaded from, with no second quantisation.

Of each type it is known whether it becomes ONNX Runtime's blocks bit for bit (``LEVEL_TYPES``), stays floating point,
or is quantised again, to 8 bits. Which tensor a matrix comes from is found by value (`gguf_rows`), and what is kept has
exactly the values of the graph. Why: docs/decisions/0023-gguf-codes.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from adalink.export.base.gguf_rows import FileMatrix, GgufRows, Places, RowsOfTensor
from adalink.export.base.integer_blocks import Float32, IntegerBlocks, pack, require_bits, round_to_nearest
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES, LEVEL_TYPES, Levels
from adalink.runtime.storage.manifest import GgufTensors, Quantization

FLOATS = ("F32", "F16", "BF16", "F64")
# Of what is quantised again: a block's weights then err by a seventeenth of the step that 4 bits have.
BITS, BLOCK_SIZE = 8, 32
_WHY = "ONNX Runtime's integer kernels have no blocks of this kind"


class Outcome(NamedTuple):
    """What became of a tensor: bits of a weight, weights of a block, and whether its values are the file's."""

    bits: int
    block_size: int
    is_exact: bool


_AS_FLOATS = Outcome(32, 0, is_exact=True)


class GgufCodes:
    """Codes of the matrices of a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Read the file; raises ``ModelError``."""
        self._rows = GgufRows(path)
        self._outcomes: dict[str, Outcome] = {}

    def blocks(self, matrix: Float32, product: str) -> IntegerBlocks | None:
        """The file's blocks of a matrix; ``None`` if it is stored as floating-point numbers and stays as it is.

        A matrix of several tensors has the most bits and the smallest blocks of them.

        Args:
            matrix: shape ``(N, K)``, as the graph multiplies with it.
            product: name of what multiplies with it, for messages.

        Raises:
            GraphError: it is not in the file.
        """
        parts = list(self._rows.find(matrix, product))
        if any(part.tensor.type in FLOATS for part in parts):
            self._outcomes |= {part.tensor.name: _AS_FLOATS for part in parts}
            return None
        types = [LEVEL_TYPES.get(part.tensor.type) for part in parts]
        bits = max(BITS if kind is None else kind.bits for kind in types)
        block_size = min(BLOCK_SIZE if kind is None else kind.scaled for kind in types)
        require_bits(bits)
        middle = 1 << bits - 1
        codes = np.empty(matrix.shape, np.uint8)
        scales = np.empty((len(matrix), matrix.shape[1] // block_size), np.float32)
        zero_points = np.full(scales.shape, middle, np.uint8)
        for part in parts:
            is_exact = part.tensor.type in LEVEL_TYPES
            self._outcomes[part.tensor.name] = Outcome(bits, block_size, is_exact)
            values = matrix[part.rows]
            if is_exact:
                levels, scales[part.rows] = _read(part.tensor, part.places, block_size)
                codes[part.rows] = (levels.astype(np.int16) + middle).astype(np.uint8)
                _check_equal(values, levels, scales[part.rows], part, product)
            else:
                again = round_to_nearest(values.T, bits, block_size)
                assert again.zero_points is not None
                codes[part.rows], scales[part.rows] = again.codes.reshape(values.shape), again.scales
                zero_points[part.rows] = again.zero_points
        return pack(codes, scales, zero_points, bits)

    def record(self, scheme: Quantization) -> Quantization:
        """A scheme with what became of the tensors that products have had, by type.

        Raises:
            GraphError: none of them has been kept, nor quantised.
        """
        types = {tensor.name: tensor.type for tensor in self._rows.tensors}
        counts = Counter((types[name], outcome) for name, outcome in self._outcomes.items())
        gguf = tuple(
            GgufTensors(type=kind, tensors=count, bits=how.bits, block_size=how.block_size, is_exact=how.is_exact)
            for (kind, how), count in sorted(counts.items())
        )
        coded = sorted((entry.bits, entry.block_size) for entry in gguf if entry.block_size)
        if not coded:
            raise GraphError(
                f"no product has codes of {self._rows.name}: its quantised tensors are merged with others in floating "
                "point, or are embeddings alone; choose int4 or int8"
            )
        (bits, block_size), (most, its_size) = coded[0], coded[-1]
        return msgspec.structs.replace(
            scheme,
            bits=bits,
            block_size=block_size,
            sensitive_bits=most,
            sensitive_block_size=its_size,
            gguf=gguf,
        )


def describe_tensors(quantization: Quantization) -> Iterator[str]:
    """What became of a GGUF file's tensors, a line for each type."""
    for entry in quantization.gguf:
        how = f"{entry.bits} bits in blocks of {entry.block_size}" if entry.block_size else "float32"
        kept = "with their values unchanged" if entry.is_exact else f"quantised again ({_WHY})"
        yield f"{entry.type}: {entry.tensors} tensors as {how}, {kept}"


def _read(tensor: FileMatrix, places: Places, block_size: int) -> tuple[Levels, Float32]:
    """Levels ``(rows, width)`` and scales ``(rows, blocks)`` of rows of a tensor, in blocks of a size or smaller."""
    kind = LEVEL_TYPES[tensor.type]
    levels, scales = kind.read(tensor.data[places].reshape(-1, BLOCK_TYPES[tensor.type].size_bytes))
    repeated = np.repeat(scales.reshape(len(places), -1), kind.scaled // block_size, axis=1)
    return levels.reshape(len(places), -1), repeated


def _check_equal(values: Float32, levels: Levels, scales: Float32, part: RowsOfTensor, product: str) -> None:
    """Check that blocks have the values of the graph, every one; raises ``GraphError``."""
    blocks = levels.reshape(*scales.shape, -1) * scales[:, :, None]
    if not np.array_equal(blocks.reshape(values.shape), values):
        raise GraphError(
            f"{product} multiplies with other values than the codes of tensor {part.tensor.name!r} have: export it "
            "with --quantize int8"
        )
