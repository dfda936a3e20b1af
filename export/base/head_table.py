"""One copy for a tied head and the embedding table: rows are read from the head's own weights in a graph's data.

A graph that is not quantised multiplies with the rows of the table (`tied_head`). Where a GGUF file stores its table in
8 bits, ``MatMulNBits`` holds the same numbers row by row. Values decide: every row must be what the embedding module
returns, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from adalink.export.base.table import keeps_every_number, module_rows, module_scale
from adalink.export.tracing.external_data import is_external, place_of
from adalink.export.writer import DeploymentWriter
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES
from adalink.runtime.storage.manifest import Base, Variant
from adalink.runtime.storage.table_schema import CODES, HALVES, HeadCodes, TableStorage

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from transformers import PreTrainedModel

_MIDDLE = 128


def share_with_head(
    writer: DeploymentWriter,
    base: Base,
    variant: Variant,
    model: PreTrainedModel,
    progress: Callable[[str], None] = lambda line: None,
) -> Base:
    """Let the table be read from the weights of a variant's head, if they are the same numbers.

    A table in blocks of a GGUF file is not read from floating-point rows: they would be larger than the blocks, should
    the variant be removed.

    Args:
        writer: of the deployment; the variant is staged, and the table is staged or there already.
        base: the base contract, with a table in a file of its own.
        variant: the staged variant.
        model: the exported model, in the base's dtype.
        progress: callback, called with one line if there is one copy of both.

    Returns:
        The base; its table is in the variant's data, and no file of its own is left, where the head has it.
    """
    import onnx

    path = variant.decoder_graph or variant.graph
    graph = onnx.load(writer.stage(path), load_external_data=False).graph
    places = [_codes(graph, writer.stage(path), base), *([] if _is_in_blocks(base) else [_rows(graph, base)])]
    for storage in chain.from_iterable(places):
        storage = msgspec.structs.replace(storage, scale=module_scale(model))
        shared = msgspec.structs.replace(base, embeddings=f"{path}.data", table=storage)
        table = open_table(writer.stage(shared.embeddings), shared)
        if keeps_every_number(base, table.block, module_rows(model)):
            writer.stage(base.embeddings).unlink(missing_ok=True)
            progress(f"the embedding table is read from the head in {shared.embeddings}: one copy of both")
            return shared
    return base


def _is_in_blocks(base: Base) -> bool:
    return base.table is not None and base.table.encoding in BLOCK_TYPES


def _rows(graph: onnx.GraphProto, base: Base) -> Iterator[TableStorage]:
    """Weights of a graph that have the shape of the table, as they lie in its data."""
    import onnx

    shape, types = [base.vocab_size, base.hidden_size], {onnx.TensorProto.DataType.Value(n.upper()): n for n in HALVES}
    types[onnx.TensorProto.FLOAT] = "float32"
    for tensor in graph.initializer:
        if list(tensor.dims) == shape and tensor.data_type in types and is_external(tensor):
            yield TableStorage(encoding=types[tensor.data_type], rows_start=place_of(tensor)[1])


def _codes(graph: onnx.GraphProto, path: Path, base: Base) -> Iterator[TableStorage]:
    """Products of a graph whose 8 bit codes have the shape of the table, and zero points of 128."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        settings = {entry.name: entry.i for entry in node.attribute}
        sizes = tuple(settings.get(name) for name in ("K", "N", "bits"))
        if node.op_type != "MatMulNBits" or sizes != (base.hidden_size, base.vocab_size, 8):
            continue
        codes, scales = (tensors[name] for name in node.input[1:3])
        block_size = settings["block_size"]
        is_aligned = base.hidden_size % block_size == 0 and scales.data_type == scales.FLOAT
        if is_aligned and _has_middle(node, tensors, path) and all(map(is_external, (codes, scales))):
            starts = {"codes_start": place_of(codes)[1], "scales_start": place_of(scales)[1]}
            yield TableStorage(encoding=CODES, head=HeadCodes(**starts, block_size=block_size))


def _has_middle(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], path: Path) -> bool:
    """Whether all zero points are 128, as they are where none are given."""
    from onnx import numpy_helper

    if len(node.input) < 4 or not node.input[3]:
        return True
    return bool((numpy_helper.to_array(tensors[node.input[3]], str(path.parent)) == _MIDDLE).all())
