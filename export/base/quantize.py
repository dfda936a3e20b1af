"""Quantisation of a base graph: constant matrices as blocks of small integers (``MatMulNBits``).

Every product with a constant matrix ``B`` of shape ``(K, N)`` becomes ONNX Runtime's ``MatMulNBits``. ONNX Runtime's
own kernels quantise it, rounding to nearest: columns are cut into blocks of consecutive rows, and each block has a
scale and a zero point, ``B ~ (code - zero_point) * scale``. Other nodes stay as they are. The embedding table is not in
the graph, so adapters are not affected. Why these block sizes: docs/decisions/0007-quantised-bases.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adalink.export.base.gguf_codes import BITS, BLOCK_SIZE, GgufCodes
from adalink.export.base.integer_blocks import IntegerBlocks, require_bits, round_to_nearest
from adalink.export.tracing.external_data import DataFile
from adalink.export.tracing.fold_weights import drop_unused
from adalink.export.tracing.graph_weights import Coding, GraphWeight, WeightedGraph
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.manifest import Quantization

if TYPE_CHECKING:
    import onnx

_OPERATOR, _DOMAIN = "MatMulNBits", "com.microsoft"
ROUND_TO_NEAREST = "round-to-nearest"
GGUF = "gguf"  # the scheme and its algorithm: codes of a GGUF file as they are, and bits of what has none
SCHEMES = {
    "int4": Quantization(
        algorithm=ROUND_TO_NEAREST, bits=4, block_size=32, sensitive_bits=8, sensitive_block_size=128, activation_bits=8
    ),
    "int8": Quantization(
        algorithm=ROUND_TO_NEAREST,
        bits=8,
        block_size=128,
        sensitive_bits=8,
        sensitive_block_size=128,
        activation_bits=8,
    ),
    GGUF: Quantization(
        algorithm=GGUF,
        bits=BITS,
        block_size=BLOCK_SIZE,
        sensitive_bits=BITS,
        sensitive_block_size=BLOCK_SIZE,
        activation_bits=8,
    ),
}
# An ``int4`` base has 4 bits only in the first matrices of a feed-forward block, where rounding costs least: a third
# of SmolLM2. They are matched by the traced module's name, in every family that can be exported.
_ENTERS_FEED_FORWARD = re.compile(
    r"/(gate_proj|up_proj|gate_up_proj|c_fc|intermediate/dense|lin1|wi|wi_[01])/(MatMul|Gemm)$"
)
_LAYER = re.compile(r"\.(\d+)/")
# The layers at both ends, one in twelve at each, stay in 8 bits.
_END_SHARE = 12
Float32 = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def quantize(graph: WeightedGraph, scheme: Quantization, name: str, gguf: GgufCodes | None = None) -> None:
    """Replace the products with constant matrices by quantised ones, in place.

    Codes are made when the graph is saved, from some columns of one matrix at a time. Those of a GGUF file are read
    here, from one matrix at a time.

    Args:
        graph: a graph in float32.
        scheme: one of ``SCHEMES``.
        name: file name of the graph, for errors.
        gguf: codes of the matrices, in place of rounding to nearest.

    Raises:
        GraphError: the graph has no product with a constant float32 matrix, or one whose codes cannot be kept.
        ConfigError: the installed ONNX Runtime has no such matrices.
    """
    import onnx

    model, nodes_before = graph.model, list(graph.model.graph.node)
    products = [node for node in nodes_before if _is_product(node, graph.weights)]
    if not products:
        raise GraphError(
            f"{name} multiplies with no constant float32 matrix, so nothing in it can be quantised: "
            "export it without --quantize"
        )
    layers = 1 + max(_layer(node.name) for node in products)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    coded: dict[tuple[str, int, bool], RoundedMatrix | KeptCodes | None] = {}
    for node in products:
        bits, block_size = _precision(node.name, scheme, layers)
        key = (node.input[1], bits, _is_transposed(node))
        if key not in coded:
            weight = graph.weights[node.input[1]]
            weight = weight.turned() if key[2] else weight
            prefix = f"{node.input[1]}.{'t' if key[2] else ''}{bits}"
            if gguf is None:
                coded[key] = RoundedMatrix(prefix, weight, bits, block_size)
            else:
                blocks = gguf.blocks(np.concatenate([part.T for part in weight.columns()]), node.name)
                coded[key] = None if blocks is None else KeptCodes(prefix, blocks)
        if (entry := coded[key]) is not None:
            replaced[node.output[0]] = _nodes(node, entry.name, entry.attributes, entry.inputs)
    nodes = [new for node in nodes_before for new in replaced.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model.graph, graph.weights)
    codings: list[Coding] = [entry for entry in coded.values() if entry is not None]
    graph.codings += codings
    if _DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))


def _nodes(
    product: onnx.NodeProto, name: str, attributes: Mapping[str, int], parts: Iterable[str]
) -> list[onnx.NodeProto]:
    """Nodes that replace a ``MatMul``, or a ``Gemm``, whose third input is then added."""
    from onnx import helper

    bias = product.input[2] if len(product.input) > 2 else ""
    output = f"{product.output[0]}.product" if bias else product.output[0]
    inputs = [product.input[0], *(f"{name}.{part}" for part in parts)]
    node = helper.make_node(_OPERATOR, inputs, [output], name=product.name, domain=_DOMAIN)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
    nodes = [node]
    if bias:
        nodes.append(helper.make_node("Add", [output, bias], product.output, name=f"{product.name}.bias"))
    return nodes


@dataclass(frozen=True)
class KeptCodes:
    """A matrix that has its blocks already.

    Attributes:
        name: its initializers are named after it.
        blocks: the blocks.
    """

    name: str
    blocks: IntegerBlocks

    @property
    def inputs(self) -> tuple[str, ...]:
        """Parts that the operator takes."""
        return tuple(self.blocks.inputs)

    @property
    def attributes(self) -> dict[str, int]:
        """The operator's attributes."""
        return self.blocks.attributes

    def write(self, data: DataFile) -> list[onnx.TensorProto]:
        """Append the blocks to ``data``; returns the initializers."""
        return _stored(self.name, self.blocks.inputs, data)


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix of shape ``(K, N)`` that is rounded to nearest when it is written.

    Attributes:
        name: its initializers are named after it.
        matrix: the matrix.
        bits: bits of a code.
        block_size: rows of a block.
    """

    name: str
    matrix: GraphWeight
    bits: int
    block_size: int
    inputs = ("codes", "scales", "zero_points")

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` if ONNX Runtime has no such codes."""
        require_bits(self.bits)

    @property
    def attributes(self) -> dict[str, int]:
        """The operator's attributes."""
        rows, columns = self.matrix.shape
        empty = np.zeros((columns, 0), np.uint8)
        return IntegerBlocks(empty, np.zeros(0, np.float32), None, self.bits, self.block_size, rows).attributes

    def write(self, data: DataFile) -> list[onnx.TensorProto]:
        """Quantise the matrix into ``data``, some columns at a time; returns the initializers."""
        from onnx import TensorProto

        rows, columns = self.matrix.shape
        scales: list[Float32] = []
        zero_points: list[Codes] = []

        def codes() -> Iterator[Codes]:
            for part in self.matrix.columns():
                blocks = round_to_nearest(part, self.bits, self.block_size)
                assert blocks.zero_points is not None
                scales.append(blocks.scales)
                zero_points.append(blocks.zero_points)
                yield blocks.codes

        shape = (columns, -(-rows // self.block_size), self.block_size * self.bits // 8)
        tensor = data.add(f"{self.name}.codes", TensorProto.UINT8, shape, codes())
        rest: dict[str, npt.NDArray[Any]] = {"scales": np.concatenate(scales)}
        rest["zero_points"] = np.concatenate(zero_points)
        return [tensor, *_stored(self.name, rest, data)]


def _stored(name: str, arrays: Mapping[str, npt.NDArray[Any]], data: DataFile) -> list[onnx.TensorProto]:
    """Arrays of a matrix as initializers named after it."""
    from onnx import numpy_helper

    return [data.move(numpy_helper.from_array(array, f"{name}.{part}")) for part, array in arrays.items()]


def _is_product(node: onnx.NodeProto, weights: Mapping[str, GraphWeight]) -> bool:
    """Whether ``node`` multiplies its first input with a constant float32 matrix, with at most an addition."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    matrix = weights.get(node.input[1])
    if matrix is None or len(matrix.shape) != 2 or str(matrix.dtype) != "torch.float32":
        return False
    factors = {entry.name: entry.f for entry in node.attribute if entry.name in ("alpha", "beta")}
    is_transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    return not is_transposed and all(factor == 1.0 for factor in factors.values())


def _is_transposed(node: onnx.NodeProto) -> bool:
    return any(entry.name == "transB" and entry.i for entry in node.attribute)


def _precision(name: str, scheme: Quantization, layers: int) -> tuple[int, int]:
    """Bits and block size for the matrix of the product ``name``, in a graph of ``layers`` layers."""
    ends = layers // _END_SHARE
    if _ENTERS_FEED_FORWARD.search(name) and ends <= _layer(name) < layers - ends:
        return scheme.bits, scheme.block_size
    return scheme.sensitive_bits, scheme.sensitive_block_size


def _layer(name: str) -> int:
    """Number of the layer that a product belongs to; -1 if it is in none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1
