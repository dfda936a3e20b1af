"""Quantised graphs read back with numpy alone: the tests' own reading of ONNX Runtime's operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

MATRIX_OPERATOR = "MatMulNBits"


def products(path: Path) -> list[tuple[onnx.NodeProto, dict[str, int]]]:
    """The quantised products of a graph and their attributes."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == MATRIX_OPERATOR]
    return [(node, {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}) for node in nodes]


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """By the node's name, its matrix with shape ``(N, K)``, one number at a time."""
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    found = {}
    for node, size in products(path):
        codes, scales, *zeros = (constants[name] for name in node.input[1:4] if name)
        per_byte = 8 // size["bits"]
        mask = 2 ** size["bits"] - 1
        matrix = np.zeros((size["N"], size["K"]))
        for row in range(size["K"]):
            block, place = divmod(row, size["block_size"])
            code = codes[:, block, place // per_byte] >> (place % per_byte * size["bits"]) & mask
            zero = 2 ** (size["bits"] - 1)  # the operator's default
            if zeros:
                zero = zeros[0].reshape(size["N"], -1)[:, block // per_byte] >> block % per_byte * size["bits"] & mask
            matrix[:, row] = (code.astype(float) - zero) * scales.reshape(size["N"], -1)[:, block]
        found[node.name] = matrix
    return found
