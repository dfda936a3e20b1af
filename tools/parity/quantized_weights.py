"""The matrices of a quantised graph, read with numpy, and the model's layers that they represent.

Layers are matched by content, not by name: a graph may have merged or renamed its products, and a name proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.error_bound import UNIT_ROUNDOFF
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    import torch

Float32 = npt.NDArray[np.float32]

OPERATOR = "MatMulNBits"
# A layer is recognised when its matrix is nearer than this, relative to its norm: four bits err by a tenth, another
# matrix of like norm by more than one.
_NEAR = 0.5
# Columns to search a layer's probe row by among a matrix's rows; a match is confirmed on the whole layer.
_PROBE_COLUMNS = 64


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix with shape ``(N, K)``: outputs by inputs.

    Attributes:
        name: of its product in the graph.
        values: the numbers that the engine multiplies with.
        scales: shape ``(N, blocks)``.
        bits: bits of a code.
        block_size: inputs of a block.
    """

    name: str
    values: Float32
    scales: Float32
    bits: int
    block_size: int


@dataclass(frozen=True)
class Layer:
    """A linear layer of the model, and its rows of a quantised matrix."""

    name: str
    module: Any
    matrix: Matrix
    rows: slice

    @property
    def values(self) -> Float32:
        """The engine's weights in the module's layout."""
        values = self.matrix.values[self.rows]
        return values.T if _is_turned(self.module) else values


def read_matrices(graph: Path) -> Iterator[Matrix]:
    """The quantised matrices of a graph, one at a time."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(graph)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != OPERATOR:
            continue
        size = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        codes, scales, *zeros = (numpy_helper.to_array(constants[name]) for name in node.input[1:4] if name)
        columns, bits = size["N"], size["bits"]
        scales = scales.reshape(columns, -1)
        values = _unpacked(codes.reshape(*scales.shape, -1), bits).astype(np.float32)
        zero_points = np.full(scales.shape, 2 ** (bits - 1), np.float32)  # the operator's default
        if zeros:
            zero_points = _unpacked(zeros[0].reshape(columns, -1), bits)[:, : scales.shape[1]].astype(np.float32)
        values = (values - zero_points[:, :, None]) * scales[:, :, None]
        yield Matrix(node.name, values.reshape(columns, -1)[:, : size["K"]], scales, bits, size["block_size"])


def find_layers(model: torch.nn.Module, matrices: list[Matrix]) -> list[Layer]:
    """The quantised linear layers, each with its rows of a matrix."""
    import torch

    missing = {name: module for name, module in model.named_modules() if _is_linear(module)}
    layers = []
    for matrix in matrices:
        width = matrix.values.shape[1]
        names = [name for name, module in missing.items() if weight_of(module).shape[1] == width]
        probes = [int(weight_of(missing[name]).norm(dim=1).argmax()) for name in names]
        if not names:
            continue
        parts = [weight_of(missing[name])[row, :_PROBE_COLUMNS] for name, row in zip(names, probes, strict=True)]
        sample = matrix.values[:, :_PROBE_COLUMNS]
        distances = np.einsum("nk,nk->n", sample, sample)[None, :] - 2 * torch.stack(parts).numpy() @ sample.T
        nearest = distances.argmin(axis=1)
        for name, probe, row in zip(names, probes, nearest, strict=True):
            weight = weight_of(missing[name]).numpy()
            place = slice(int(row) - probe, int(row) - probe + len(weight))
            if place.start < 0 or place.stop > len(matrix.values):
                continue
            if np.linalg.norm(matrix.values[place] - weight) < _NEAR * np.linalg.norm(weight):
                layers.append(Layer(name, missing.pop(name), matrix, place))
    return layers


def check_matrices(layers: list[Layer], matrices: list[Matrix]) -> Check:
    """Every row of every matrix must be a layer's."""
    covered = {id(matrix): np.zeros(len(matrix.values), bool) for matrix in matrices}
    for layer in layers:
        covered[id(layer.matrix)][layer.rows] = True
    strangers = [matrix.name for matrix in matrices if not covered[id(matrix)].all()]
    count = sum(int((~rows).sum()) for rows in covered.values())
    return at_most(
        "quantization/matrices",
        count,
        0,
        f"outputs of {len(matrices)} quantised products that are no layer of the model; in: {strangers or 'none'}",
    )


def check_weights(layers: list[Layer]) -> list[Check]:
    """Every weight must be within half a step of the model's.

    With ``s`` the distance from a block's smallest to its largest weight (0 counted in), divided by the largest code,
    no weight lies further than ``s / 2`` from its nearest code, the ends of the block included: rounding the zero point
    shifts all codes by at most half a step.
    """
    steps, scales = (0.0, "none"), (0.0, "none")
    slack = 0.0
    for layer in layers:
        weight = weight_of(layer.module).numpy().astype(np.float64)
        top = 2**layer.matrix.bits - 1
        slack = max(slack, 8 * top * UNIT_ROUNDOFF["float32"])
        blocks = _blocks(weight, layer.matrix.block_size)
        step = (np.maximum(blocks.max(axis=2), 0) - np.minimum(blocks.min(axis=2), 0)) / top
        error = np.abs(_blocks(layer.matrix.values[layer.rows].astype(np.float64) - weight, layer.matrix.block_size))
        safe = np.where(step > 0, step, 1.0)
        steps = max(steps, (float((error.max(axis=2) / (safe / 2)).max()), layer.name))
        stored = np.abs(layer.matrix.scales[layer.rows].astype(np.float64))
        scales = max(scales, (float((np.abs(stored - step) / safe).max()), layer.name))
    return [
        at_most(
            "quantization/weights",
            steps[0],
            1 + slack,
            f"|Δ| of a weight in half steps of its block, largest of {len(layers)} layers: {steps[1]}",
        ),
        at_most(
            "quantization/scales",
            scales[0],
            8 * UNIT_ROUNDOFF["float32"],
            f"relative deviation of a block's scale from its range / largest code; largest: {scales[1]}",
        ),
    ]


@contextmanager
def rounded_inputs(layer: Layer, module: Any) -> Iterator[None]:
    """Round the inputs of ``module``, the layer in either precision, to 8 bits until the block ends.

    The step of a block is its largest magnitude over 127, as in the operator at ``accuracy_level`` 4 (ONNX Runtime,
    ``sqnbitgemm``). The implementation is independent of it.
    """
    import torch

    size = layer.matrix.block_size

    def rounded(_: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = arguments[0]
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
        blocks = padded.reshape(*x.shape[:-1], -1, size)
        step = blocks.abs().amax(dim=-1, keepdim=True) / 127
        near = torch.where(step > 0, torch.round(blocks / step) * step, blocks)
        return (near.flatten(-2)[..., : x.shape[-1]], *arguments[1:])

    handle = module.register_forward_pre_hook(rounded)
    try:
        yield
    finally:
        handle.remove()


def weight_of(module: Any) -> torch.Tensor:
    """A linear layer's matrix as ``(outputs, inputs)``; GPT-2 stores it the other way round."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if _is_turned(module) else weight


def _is_turned(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or _is_turned(module)


def _blocks(matrix: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Shape ``(rows, columns)`` to ``(rows, blocks, size)``, the last block filled with zeros."""
    rows, columns = matrix.shape
    return np.pad(matrix, ((0, 0), (0, -columns % size))).reshape(rows, -1, size)


def _unpacked(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes one to a byte, along the last axis; of two in a byte the lower four bits come first."""
    if bits == 8:
        return codes
    halves: npt.NDArray[np.uint8] = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
    return halves.reshape(*codes.shape[:-1], -1)
