"""The matrices of a quantised graph, read with numpy, and the model's layers that they represent.

Layers are matched by content, not by name: a graph may have merged or renamed its products, and a name proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.error_bound import UNIT_ROUNDOFF
from adalink.tools.parity.reference.file_tensors import FileTensor
from adalink.tools.parity.reference.rounding import rounded_blocks
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    import onnx
    import torch

    from adalink.tools.parity.reference.stored_weight import WeightSource

Float32 = npt.NDArray[np.float32]

OPERATOR = "MatMulNBits"
# A layer is recognised when its matrix is nearer than this, relative to its norm: four bits err by a tenth, another
# matrix of like norm by more than one.
_NEAR = 0.5
# Columns to search a layer's probe row by among a matrix's rows; a match is confirmed on the whole layer.
_PROBE_COLUMNS = 64
# The two codes of a byte: the lower four bits come first.
_PAIRS = np.array([[byte & 15, byte >> 4] for byte in range(256)], np.float32)


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix with shape ``(N, K)``, outputs by inputs, whose numbers stay in the graph's file.

    Attributes:
        name: of its product in the graph.
        shape: its shape.
        codes: bytes, shape ``(N, bytes)``.
        scales: shape ``(N, blocks)``.
        zeros: zero points as codes, shape ``(N, bytes)``; ``None`` for the operator's default.
        bits: bits of a code.
        block_size: inputs of a block.
    """

    name: str
    shape: tuple[int, int]
    codes: WeightSource
    scales: WeightSource
    zeros: WeightSource | None
    bits: int
    block_size: int

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The numbers that the engine multiplies with, in float32: its rows from ``start`` to ``stop``."""
        import torch

        scales = self.scales_of(start, stop)
        values = self._unpacked(self.codes, start, stop).reshape(*scales.shape, -1)
        if self.zeros is None:
            values -= np.float32(2 ** (self.bits - 1))
        else:
            values -= self._unpacked(self.zeros, start, stop)[:, : scales.shape[1], None]
        values *= scales[:, :, None]
        return torch.from_numpy(values.reshape(len(values), -1)[:, : self.shape[1]])

    def scales_of(self, start: int, stop: int | None) -> Float32:
        """Scales of its rows from ``start`` to ``stop``, shape ``(rows, blocks)``."""
        return np.asarray(self.scales.read(start, stop).float().numpy())

    def _unpacked(self, codes: WeightSource, start: int, stop: int | None) -> Float32:
        """Codes as numbers, shape ``(rows, codes)``."""
        stored = codes.read(start, stop).numpy()
        if self.bits == 8:
            return stored.astype(np.float32)
        return np.asarray(_PAIRS[stored].reshape(len(stored), -1))


@dataclass(frozen=True)
class Layer:
    """A linear layer of the model, and its rows of a quantised matrix."""

    name: str
    module: Any
    matrix: Matrix
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs by inputs."""
        return self.rows.stop - self.rows.start, self.matrix.shape[1]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The engine's weights of some outputs, shape ``(outputs, inputs)``."""
        stop = self.shape[0] if stop is None else stop
        return self.matrix.read(self.rows.start + start, self.rows.start + stop)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The engine's weights as a parameter of the module, in its layout."""
        from adalink.tools.parity.reference.stored_weight import StoredWeight, TensorSource

        return StoredWeight(TensorSource(self.read().T) if _is_turned(self.module) else self, dtype)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """See ``adalink.tools.parity.reference.rounding.RoundedProduct``."""
        return rounded_blocks(x, self.matrix.block_size)

    def pairs(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Outputs in turn, some at a time: their rows of the matrix, the engine's weights and the module's."""
        from adalink.tools.parity.reference.stored_weight import pieces_of

        for place, weight in pieces_of(weight_of(self.module)):
            rows = slice(self.rows.start + place.start, self.rows.start + place.stop)
            yield rows, self.matrix.read(rows.start, rows.stop), weight


def read_matrices(graph: Path) -> Iterator[Matrix]:
    """The quantised matrices of a graph."""
    import onnx
    from onnx import helper

    model = onnx.load(graph, load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != OPERATOR:
            continue
        size = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        shape = size["N"], size["K"]
        codes, scales, *zeros = (_rows_of(constants[name], graph, shape[0]) for name in node.input[1:4] if name)
        yield Matrix(node.name, shape, codes, scales, zeros[0] if zeros else None, size["bits"], size["block_size"])


def _rows_of(tensor: onnx.TensorProto, graph: Path, rows: int) -> WeightSource:
    """A constant of a graph, or of the file beside it, as so many rows."""
    import torch
    from onnx import external_data_helper, helper, numpy_helper

    from adalink.tools.parity.reference.stored_weight import TensorSource

    if not external_data_helper.uses_external_data(tensor):
        return TensorSource(torch.from_numpy(numpy_helper.to_array(tensor).reshape(rows, -1).copy()))
    said = external_data_helper.ExternalDataInfo(tensor)
    shape = (rows, math.prod(tensor.dims) // rows)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    return FileTensor(tensor.name, graph.with_name(said.location), said.offset or 0, shape, dtype)


@dataclass(frozen=True)
class _Probe:
    """A row of a layer to find it by: the one with the largest norm."""

    module: Any
    row: int
    values: Float32

    @property
    def outputs(self) -> int:
        return int(weight_of(self.module).shape[0])


def find_layers(model: torch.nn.Module, matrices: list[Matrix]) -> list[Layer]:
    """The quantised linear layers, each with its rows of a matrix."""
    missing = {name: _probe(module) for name, module in model.named_modules() if is_linear(module)}
    layers: list[Layer] = []
    for matrix in matrices:
        probes = {name: probe for name, probe in missing.items() if len(probe.values) == matrix.shape[1]}
        if not probes:
            continue
        parts = np.stack([probe.values[:_PROBE_COLUMNS] for probe in probes.values()])
        sample = _sample(matrix)
        distances = np.einsum("nk,nk->n", sample, sample)[None, :] - 2 * parts @ sample.T
        for (name, probe), row in zip(probes.items(), distances.argmin(axis=1).tolist(), strict=True):
            start = row - probe.row
            layer = Layer(name, probe.module, matrix, slice(start, start + probe.outputs))
            if start >= 0 and layer.rows.stop <= matrix.shape[0] and _is_near(layer, probe):
                layers.append(layer)
                del missing[name]
    return layers


def _probe(module: Any) -> _Probe:
    from adalink.tools.parity.reference.stored_weight import pieces_of

    largest, found = -1.0, _Probe(module, 0, np.zeros(0, np.float32))
    for place, weight in pieces_of(weight_of(module)):
        norms = weight.norm(dim=1)
        row = int(norms.argmax())
        if float(norms[row]) > largest:
            largest = float(norms[row])
            found = _Probe(module, place.start + row, weight[row].clone().numpy())
    return found


def _sample(matrix: Matrix) -> Float32:
    """The first columns of all rows."""
    from adalink.tools.parity.reference.stored_weight import pieces_of

    return np.concatenate([rows[:, :_PROBE_COLUMNS].clone().numpy() for _, rows in pieces_of(matrix)])


def _is_near(layer: Layer, probe: _Probe) -> bool:
    """Whether rows of a matrix are a layer's: its probe, then all of them."""
    row = layer.read(probe.row, probe.row + 1)[0].numpy()
    if not np.linalg.norm(row - probe.values) < _NEAR * np.linalg.norm(probe.values):
        return False
    apart = size = 0.0
    for _, engine, weight in layer.pairs():
        apart += float((engine - weight).double().square().sum())
        size += float(weight.double().square().sum())
    return apart < _NEAR**2 * size


def check_matrices(layers: list[Layer], matrices: list[Matrix]) -> Check:
    """Every row of every matrix must be a layer's."""
    covered = {id(matrix): np.zeros(matrix.shape[0], bool) for matrix in matrices}
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
        top, size = 2**layer.matrix.bits - 1, layer.matrix.block_size
        slack = max(slack, 8 * top * UNIT_ROUNDOFF["float32"])
        for rows, engine, weight in layer.pairs():
            exact = weight.double().numpy()
            blocks = _blocks(exact, size)
            step = (np.maximum(blocks.max(axis=2), 0) - np.minimum(blocks.min(axis=2), 0)) / top
            error = np.abs(_blocks(engine.double().numpy() - exact, size))
            safe = np.where(step > 0, step, 1.0)
            steps = _larger(steps, (error.max(axis=2) / (safe / 2)).max(), layer.name)
            stored = np.abs(layer.matrix.scales_of(rows.start, rows.stop).astype(np.float64))
            scales = _larger(scales, (np.abs(stored - step) / safe).max(), layer.name)
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


def _larger(known: tuple[float, str], measured: np.floating[Any], name: str) -> tuple[float, str]:
    """The larger of two deviations, with the name of its layer; NaN is larger than any number."""
    return known if measured <= known[0] else (float(measured), name)


def weight_of(module: Any) -> torch.Tensor:
    """A linear layer's matrix as ``(outputs, inputs)``; GPT-2 stores it the other way round."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if _is_turned(module) else weight


def _is_turned(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_linear(module: Any) -> bool:
    """Whether a module multiplies its input with a matrix."""
    import torch

    return isinstance(module, torch.nn.Linear) or _is_turned(module)


def _blocks(matrix: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Shape ``(rows, columns)`` to ``(rows, blocks, size)``, the last block filled with zeros."""
    return np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % size))).reshape(len(matrix), -1, size)
