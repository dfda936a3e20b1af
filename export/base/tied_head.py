"""A tied head that multiplies with the embedding table as it lies, so that the graph's data hold the table.

PyTorch multiplies with the transposed matrix. Written so, a row of the table is scattered over all of it. ONNX Runtime
packs either form into the same blocks when it opens the graph: speed, memory and every bit of the logits are the same
(docs/decisions/0022-embedding-table.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.export.tracing.fold_weights import drop_unused
from adalink.export.tracing.graph_weights import WeightedGraph, placeholder

if TYPE_CHECKING:
    import onnx

    from adalink.training.models.weights import Weight


def keep_table_rows(traced: WeightedGraph, table: Weight, *, is_flat: bool) -> None:
    """Let products with the transposed embedding table have its rows, in place.

    Requires a graph whose transposed weights are folded. Ensures the same outputs for all inputs.

    Args:
        traced: the graph.
        table: the embedding matrix; a head is tied to it if it is the same weight.
        is_flat: whether the head's input is a matrix, which ``Gemm`` takes. Otherwise the graph transposes the table,
            which is done once, when it is opened.
    """
    graph = traced.model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = traced.weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or not weight.is_turned or weight.weight is not table:
            nodes.append(node)
            continue
        rows = node.input[1].removesuffix(".transposed")
        if rows not in traced.weights:
            traced.weights[rows] = weight.turned()
            graph.initializer.append(placeholder(rows, weight.turned()))
        nodes += _product(node, rows, is_flat)
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph, traced.weights)


def _product(node: onnx.NodeProto, rows: str, is_flat: bool) -> list[onnx.NodeProto]:
    """The product ``node`` with rows in place of columns."""
    from onnx import helper

    if is_flat:
        return [helper.make_node("Gemm", [node.input[0], rows], node.output, name=node.name, transB=1)]
    columns = f"{node.output[0]}.columns"
    turn = helper.make_node("Transpose", [rows], [columns], name=f"{node.name}.transpose", perm=[1, 0])
    return [turn, helper.make_node("MatMul", [node.input[0], columns], node.output, name=node.name)]
