"""One copy for a tied head and the embedding table: rows are read from the head's own codes in a graph's data.

Where a GGUF file stores its table in 8 bits and the head is tied to it, the graph's ``MatMulNBits`` holds the same
numbers row by row. Values decide: every row must be what the embedding module returns, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from adalink.export.base.table import keeps_every_number, module_rows, module_scale
from adalink.export.tracing.external_data import is_external, place_of
from adalink.export.writer import DeploymentWriter
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.manifest import Base, Variant
from adalink.runtime.storage.table_schema import CODES, HeadCodes, TableStorage

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from transformers import PreTrainedModel

_MIDDLE = 128


def share_with_head(writer: DeploymentWriter, base: Base, variant: Variant, model: PreTrainedModel) -> Base:
    """Let the table of a new deployment be read from the codes of its head, if they are the same numbers.

    Args:
        writer: of the deployment; the variant and the table are staged.
        base: the base contract.
        variant: the staged variant.
        model: the exported model, in the base's dtype.

    Returns:
        The base; its table is in the variant's data, and no file of its own is staged, where the head has it.
    """
    path = variant.decoder_graph or variant.graph
    for head in _heads(writer.stage(path), base):
        storage = TableStorage(encoding=CODES, scale=module_scale(model), head=head)
        shared = msgspec.structs.replace(base, embeddings=f"{path}.data", table=storage)
        table = open_table(writer.stage(shared.embeddings), shared)
        if keeps_every_number(base, table.block, module_rows(model)):
            writer.stage(base.embeddings).unlink()
            return shared
    return base


def _heads(path: Path, base: Base) -> Iterator[HeadCodes]:
    """Products of a graph whose 8 bit codes have the shape of the table, and zero points of 128."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
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
            yield HeadCodes(codes_start=place_of(codes)[1], scales_start=place_of(scales)[1], block_size=block_size)


def _has_middle(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], path: Path) -> bool:
    """Whether all zero points are 128, as they are where none are given."""
    from onnx import numpy_helper

    if len(node.input) < 4 or not node.input[3]:
        return True
    return bool((numpy_helper.to_array(tensors[node.input[3]], str(path.parent)) == _MIDDLE).all())
