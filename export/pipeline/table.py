"""The embedding table of a deployment as initializers of a graph: its file is referred to, where ONNX can read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adalink.export.adapter.nodes import edge_type
from adalink.export.table_file import blocks_of_rows
from adalink.export.tracing.external_data import DataFile
from adalink.runtime.arrays import Array
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES, LEVEL_TYPES, OFFSET_TYPES
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.table_schema import NUMBERS

if TYPE_CHECKING:
    import onnx

# Name of the value that a lookup gives.
EMBEDS = "embeds"
# The code of 0.
_MIDDLE = 128


@dataclass(frozen=True)
class Lookup:
    """Nodes from ``input_ids`` to ``EMBEDS`` in the base's dtype, and the table's initializers."""

    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]


def refer_to_table(base: Base, file: Path) -> Lookup:
    """A lookup in a linked file: the deployment's table, or the data of a graph that has it in its head.

    Args:
        base: the contract; its table is not in GGUF blocks (``is_readable``).
        file: where the file lies, in the folder of the graph.
    """
    from onnx import TensorProto

    table, shape = base.table, (base.vocab_size, base.hidden_size)
    if table is not None and table.head is not None:
        head = table.head
        blocks = base.hidden_size // head.block_size
        codes = _external("table_codes", TensorProto.UINT8, (base.vocab_size, blocks, head.block_size))
        scales = _external("table_scales", TensorProto.FLOAT, (base.vocab_size, blocks, 1))
        _place(codes, file, head.codes_start, base.vocab_size * base.hidden_size)
        _place(scales, file, head.scales_start, 4 * base.vocab_size * blocks)
        return Lookup(_from_codes(base), [codes, scales])
    dtype = base.embedding_dtype if table is None else table.encoding
    rows = _external("table", edge_type(dtype), shape)
    length = base.vocab_size * base.hidden_size * (4 if dtype == "float32" else 2)
    start = None if table is None else table.rows_start
    _place(rows, file, file.stat().st_size - length if start is None else start, length)
    return Lookup(_from_rows(base, dtype), [rows])


def copy_table(base: Base, table: EmbeddingTable, graph: Path) -> Lookup:
    """A lookup in the data file of a graph: codes of GGUF blocks with their scales, or rows in the base's dtype.

    Args:
        base: the contract; its table is in GGUF blocks.
        table: the table.
        graph: where the graph will be.
    """
    assert base.table is not None
    with DataFile(graph) as data:
        if base.table.encoding in LEVEL_TYPES or base.table.encoding in OFFSET_TYPES:
            return _copy_codes(base, base.table.encoding, table, data)
        blocks = (table.block(*ids) for ids in blocks_of_rows(len(table)))
        rows = data.add("table", edge_type(base.embedding_dtype), table.shape, blocks)
    return Lookup(_from_rows(base, base.embedding_dtype, scale=1.0), [rows])


def is_readable(base: Base) -> bool:
    """Whether ONNX can read the table as it lies in its file; GGUF blocks it cannot."""
    table = base.table
    return table is None or table.head is not None or table.encoding in NUMBERS


def _from_rows(base: Base, dtype: str, scale: float | None = None) -> list[onnx.NodeProto]:
    from onnx import helper

    scale = scale if scale is not None else 1.0 if base.table is None else base.table.scale
    if dtype == base.embedding_dtype and scale == 1:
        return [helper.make_node("Gather", ["table", "input_ids"], [EMBEDS], axis=0)]
    gather = helper.make_node("Gather", ["table", "input_ids"], ["stored"], axis=0)
    widen = helper.make_node("Cast", ["stored"], ["expanded"], to=edge_type("float32"))
    return [gather, widen, *_finish(base, scale)]


def _copy_codes(base: Base, encoding: str, table: EmbeddingTable, data: DataFile) -> Lookup:
    """Codes of 8 bits, and scales (and offsets) in 16 bits where these hold them; they give every row bit for bit."""
    from onnx import TensorProto

    scaled = LEVEL_TYPES[encoding].scaled if encoding in LEVEL_TYPES else OFFSET_TYPES[encoding].scaled
    shape = (base.vocab_size, base.hidden_size // scaled)

    def part(place: int, first: int, last: int) -> Array:
        blocks = table.parts[0][first:last].reshape(-1, BLOCK_TYPES[encoding].size_bytes)
        if encoding in OFFSET_TYPES:
            return OFFSET_TYPES[encoding].read(blocks)[place]
        levels, scales = LEVEL_TYPES[encoding].read(blocks)
        return (levels.view(np.uint8) + np.uint8(_MIDDLE)) if place == 0 else scales

    def each(place: int) -> Iterator[Array]:
        return (part(place, *ids) for ids in blocks_of_rows(len(table)))

    lines = []
    for place, name in enumerate(("scales", "offsets")[: 2 if encoding in OFFSET_TYPES else 1], 1):
        is_half = all(np.array_equal(piece.astype(np.float16), piece) for piece in each(place))
        dtype, kind = (np.float16, TensorProto.FLOAT16) if is_half else (np.float32, TensorProto.FLOAT)
        pieces = (piece.astype(dtype) for piece in each(place))
        lines.append(data.add(f"table_{name}", kind, (*shape, 1), pieces))
    codes = data.add("table_codes", TensorProto.UINT8, (*shape, scaled), each(0))
    return Lookup(_from_codes(base, 0 if encoding in OFFSET_TYPES else _MIDDLE, len(lines) > 1), [codes, *lines])


def _from_codes(base: Base, middle: int = _MIDDLE, has_offsets: bool = False) -> list[onnx.NodeProto]:
    """Rows ``(code - middle) * scale``, plus offsets."""
    from onnx import helper

    assert base.table is not None
    values = ("codes", "scales", *(("offsets",) if has_offsets else ()))
    nodes = [helper.make_node("Gather", [f"table_{name}", "input_ids"], [name], axis=0) for name in values]
    nodes += [helper.make_node("Cast", [name], [f"{name}_32"], to=edge_type("float32")) for name in values]
    nodes += [
        _constant("middle", float(middle)),
        helper.make_node("Sub", ["codes_32", "middle"], ["levels"]),
        helper.make_node("Mul", ["levels", "scales_32"], ["products"]),
    ]
    if has_offsets:
        nodes.append(helper.make_node("Add", ["products", "offsets_32"], ["blocks"]))
    row = "blocks" if has_offsets else "products"
    shape = _constant("row", [0, 0, base.hidden_size])
    return [*nodes, shape, helper.make_node("Reshape", [row, "row"], ["expanded"]), *_finish(base, base.table.scale)]


def _finish(base: Base, scale: float) -> list[onnx.NodeProto]:
    """From ``expanded``, float32, to ``EMBEDS``: times the module's factor, then in the base's dtype."""
    from onnx import helper

    nodes = [_constant("factor", float(scale)), helper.make_node("Mul", ["expanded", "factor"], ["scaled"])]
    return [*nodes, helper.make_node("Cast", ["scaled"], [EMBEDS], to=edge_type(base.embedding_dtype))]


def _constant(name: str, value: float | list[int]) -> onnx.NodeProto:
    from onnx import helper, numpy_helper

    array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))


def _external(name: str, data_type: int, shape: tuple[int, ...]) -> onnx.TensorProto:
    from onnx import TensorProto

    return TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)


def _place(tensor: onnx.TensorProto, file: Path, start: int, length: int) -> None:
    for key, value in {"location": file.name, "offset": start, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
