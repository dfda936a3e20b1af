"""Quantisation of a base graph: constant matrices as blocks of small integers (``MatMulNBits``).

Every product with a constant matrix ``B`` of shape ``(K, N)`` becomes ONNX Runtime's ``MatMulNBits``. ONNX Runtime's
own kernels quantise it, rounding to nearest: columns are cut into blocks of consecutive rows, and each block has a
scale and a zero point, ``B ~ (code - zero_point) * scale``. Other nodes stay as they are. The embedding table is not in
the graph, so adapters are not affected. Why these block sizes: docs/decisions/0007-quantised-bases.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adalink.export.base.gguf_codes import BITS, BLOCK_SIZE, GgufCodes
from adalink.export.base.integer_blocks import IntegerBlocks, round_to_nearest
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
_EXTERNAL_FROM_BYTES = 1024
_ALIGNMENT = 4096

Progress = Callable[[str], None]


def quantize(
    source: Path, target: Path, scheme: Quantization, progress: Progress, gguf: GgufCodes | None = None
) -> None:
    """Write the graph ``source`` with its constant matrices quantised as ``target``.

    One matrix is in memory at a time.

    Args:
        source: a graph in float32, with its weights in ``<source>.data``.
        target: file to write, new, in another folder; its weights go to ``<target>.data``.
        scheme: one of ``SCHEMES``.
        progress: callback, called with one line now and then.
        gguf: codes of the matrices, in place of rounding to nearest.

    Raises:
        GraphError: the graph has no product with a constant float32 matrix, or one whose codes cannot be kept.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    products = {node.output[0]: node for node in graph.node if _is_product(node, constants)}
    if not products:
        raise GraphError(
            f"{source.name} multiplies with no constant float32 matrix, so nothing in it can be quantised: "
            "export it without --quantize"
        )
    layers = 1 + max(_layer(node.name) for node in products.values())
    rewritten: dict[str, list[onnx.NodeProto]] = {}
    coded: dict[tuple[str, int, bool], _Coded | None] = {}
    with target.with_name(f"{target.name}.data").open("wb") as stream:
        for index, (output, node) in enumerate(products.items()):
            if index % max(1, len(products) // 4) == 0:
                progress(f"quantising {source.name}: matrix {index + 1} of {len(products)}")
            bits, block_size = _precision(node.name, scheme, layers)
            key = (node.input[1], bits, _is_transposed(node))
            if key not in coded:
                matrix = _values(constants[node.input[1]], source)
                matrix = matrix.T if key[2] else matrix
                blocks = gguf.blocks(matrix.T, node.name) if gguf else round_to_nearest(matrix, bits, block_size)
                prefix = f"{node.input[1]}.{'t' if key[2] else ''}{bits}"
                coded[key] = None if blocks is None else _store(blocks, prefix, stream, target)
            if (entry := coded[key]) is not None:
                rewritten[output] = entry.nodes(node)
        nodes = [new for node in graph.node for new in rewritten.get(node.output[0], [node])]
        used = {name for node in nodes for name in node.input}
        kept = [_moved(tensor, source, stream, target) for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *(part for entry in coded.values() if entry for part in entry.parts)])
    if _DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    target.write_bytes(model.SerializeToString())


@dataclass(frozen=True)
class _Coded:
    """A quantised matrix of shape ``(K, N)``.

    Attributes:
        parts: its tensors: codes, scales, zero points.
        attributes: of the operator.
    """

    parts: list[onnx.TensorProto]
    attributes: dict[str, int]

    def nodes(self, product: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Nodes that replace a ``MatMul``, or a ``Gemm``, whose third input is then added."""
        from onnx import helper

        bias = product.input[2] if len(product.input) > 2 else ""
        output = f"{product.output[0]}.product" if bias else product.output[0]
        inputs = [product.input[0], *(part.name for part in self.parts)]
        node = helper.make_node(_OPERATOR, inputs, [output], name=product.name, domain=_DOMAIN)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in self.attributes.items())
        nodes = [node]
        if bias:
            nodes.append(helper.make_node("Add", [output, bias], product.output, name=f"{product.name}.bias"))
        return nodes


def _is_product(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether ``node`` multiplies its first input with a constant float32 matrix, with at most an addition."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    matrix = constants.get(node.input[1])
    if matrix is None or len(matrix.dims) != 2 or matrix.data_type != matrix.FLOAT:
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


def _store(blocks: IntegerBlocks, name: str, stream: BinaryIO, target: Path) -> _Coded:
    """Write the tensors of a matrix, named after ``name``, to ``stream``."""
    parts = [_stored(f"{name}.{part}", array, stream, target) for part, array in blocks.inputs.items()]
    return _Coded(parts, blocks.attributes)


def _values(tensor: onnx.TensorProto, source: Path) -> npt.NDArray[np.float32]:
    """Values of a tensor, memory-mapped if they are external data."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, shape = int(entries.get("offset", 0)), tuple(tensor.dims)
    return np.memmap(source.with_name(entries["location"]), np.float32, "r", offset, shape)


def _stored(name: str, array: npt.NDArray[Any], stream: BinaryIO, target: Path) -> onnx.TensorProto:
    """A tensor with its values in ``stream``; small tensors stay in the graph."""
    from onnx import TensorProto, numpy_helper

    if array.nbytes < _EXTERNAL_FROM_BYTES:
        return numpy_helper.from_array(array, name)
    tensor = TensorProto(name=name, data_type=numpy_helper.from_array(array[:0]).data_type, dims=array.shape)
    return _outside(tensor, array.tobytes(), stream, target)


def _moved(tensor: onnx.TensorProto, source: Path, stream: BinaryIO, target: Path) -> onnx.TensorProto:
    """A tensor of the source, with its values copied if they are external data."""
    if tensor.data_location != tensor.EXTERNAL:
        return tensor
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with source.with_name(entries["location"]).open("rb") as origin:
        origin.seek(int(entries.get("offset", 0)))
        data = origin.read(int(entries["length"]))
    return _outside(tensor, data, stream, target)


def _outside(tensor: onnx.TensorProto, data: bytes, stream: BinaryIO, target: Path) -> onnx.TensorProto:
    """Let ``tensor`` refer to ``data``, appended to the stream of ``<target>.data``."""
    from onnx import TensorProto, external_data_helper

    stream.write(bytes(-stream.tell() % _ALIGNMENT))
    offset = stream.tell()
    stream.write(data)
    moved = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=b"")
    external_data_helper.set_external_data(moved, f"{target.name}.data", offset, len(data))
    moved.ClearField("raw_data")
    moved.data_location = TensorProto.EXTERNAL
    return moved
