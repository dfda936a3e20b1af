"""The graph before a base's own: from token ids and a task's weights to what the base takes.

It takes one sequence. Rows of other lengths would need padding, which the base's graph does not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.export.adapter.nodes import INPUT_NAME, edge_type, finish_model, residual_nodes
from adalink.export.pipeline.table import EMBEDS, Lookup
from adalink.export.pipeline.tasks import INPUTS
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import onnx

# Names of inputs of the base's graph.
_LENGTHS, _PLACES = "sequence_lengths", "logits_at"


def build_front(base: Base, lookup: Lookup, activations: tuple[str, ...], positions: int | None) -> onnx.ModelProto:
    """Build the graph.

    Inputs: ``input_ids`` int64 ``(1, sequence)``, ``attention_mask`` int64 ``(1, total)``, of which only the length is
    read, and a task's weights (`adalink.export.pipeline.tasks.task_tensors`).

    Outputs: what the base's graph takes. ``inputs_embeds`` ``(1, sequence, d)``, ``sequence_lengths`` int32 ``(1,)``,
    ``logits_at`` int64 ``(1,)``, and ``position_ids`` if it takes them.

    Args:
        base: the contract.
        lookup: how tokens are looked up.
        activations: those that the tasks use, some of ``ACTIVATIONS``; a task with another one is an error when run.
        positions: axes of the base's position ids, 0 for none of their own; ``None`` if it takes none.
    """
    from onnx import TensorProto, helper

    width = base.hidden_size
    sequence: list[str | int | None] = [1, "sequence"]
    shapes: dict[str, list[str | int | None]] = {
        "down": [1, "rank", width],
        "up": [1, width, "rank"],
        "down_bias": [1, 1, "rank"],
        "up_bias": [1, 1, width],
    }
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, sequence),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"]),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in INPUTS if name in shapes),
        helper.make_tensor_value_info("activation", TensorProto.INT64, [1]),
    ]
    dtype = edge_type(base.embedding_dtype)
    outputs = [
        helper.make_tensor_value_info(INPUT_NAME, dtype, [*sequence, width]),
        helper.make_tensor_value_info(_LENGTHS, TensorProto.INT32, [1]),
        helper.make_tensor_value_info(_PLACES, TensorProto.INT64, [1]),
    ]
    nodes = [*lookup.nodes, *_adapt(activations, dtype), *_lengths()]
    places = [activations.index(name) if name in activations else len(activations) for name in ACTIVATIONS]
    initializers = [_int64("one", [1]), _int64("front", [0]), _int64("places", places)]
    if positions is not None:
        shape = [*sequence, positions] if positions else sequence
        outputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, shape))
        initializers += [_int64("step", 1), _int64("first", [0])]
        if positions:
            initializers += [_int64("last", [2]), _int64("axes", [1, 1, positions])]
        nodes += _positions(positions)
    # The checker would look for the table's file: it is an input until the graph is checked.
    tables = [helper.make_tensor_value_info(table.name, table.data_type, table.dims) for table in lookup.initializers]
    graph = helper.make_graph(nodes, "adalink_front", [*inputs, *tables], outputs, initializers)
    model = finish_model(graph, {"pipeline": "front"})
    del model.graph.input[len(inputs) :]
    model.graph.initializer.extend(lookup.initializers)
    return model


def _adapt(activations: tuple[str, ...], dtype: int) -> list[onnx.NodeProto]:
    """Nodes from ``EMBEDS`` to ``inputs_embeds``: the bottleneck in float32, with the activation that is asked for.

    One that is not computed here has a place behind the last, which ONNX Runtime refuses.
    """
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Transpose", [name], [f"{name}_t"], perm=[0, 2, 1]) for name in ("down", "up")]
    source = EMBEDS
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [source], ["x"], to=TensorProto.FLOAT))
        source = "x"
    for name in activations:
        nodes += residual_nodes(f"{name}_", source, "down_t", "up_t", ("down_bias", "up_bias"), name)
        nodes.append(helper.make_node("Unsqueeze", [f"{name}_adapted", "front"], [f"{name}_result"]))
    return [
        *nodes,
        helper.make_node("Concat", [f"{name}_result" for name in activations], ["results"], axis=0),
        helper.make_node("Gather", ["places", "activation"], ["place"], axis=0),
        helper.make_node("Gather", ["results", "place"], ["result"], axis=0),
        helper.make_node("Squeeze", ["result", "front"], ["adapted"]),
        helper.make_node("Cast", ["adapted"], [INPUT_NAME], to=dtype),
    ]


def _lengths() -> list[onnx.NodeProto]:
    """Nodes from lengths of the inputs to ``sequence_lengths`` and ``logits_at``.

    A mask holds zeros where a token is the padding token, which texts of chats hold too: its sum is no length.
    """
    from onnx import TensorProto, helper

    return [
        helper.make_node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        helper.make_node("Cast", ["total"], [_LENGTHS], to=TensorProto.INT32),
        helper.make_node("Shape", ["input_ids"], ["count"], start=1, end=2),
        helper.make_node("Sub", ["count", "one"], [_PLACES]),
    ]


def _positions(axes: int) -> list[onnx.NodeProto]:
    """Nodes of ``position_ids``: the last ``sequence`` of ``total`` positions, which are a text's along every axis."""
    from onnx import helper

    nodes = [
        helper.make_node("Sub", ["total", "count"], ["before"]),
        helper.make_node("Squeeze", ["before"], ["start"]),
        helper.make_node("Squeeze", ["total"], ["end"]),
        helper.make_node("Range", ["start", "end", "step"], ["positions"]),
        helper.make_node("Unsqueeze", ["positions", "first"], ["row" if axes else "position_ids"]),
    ]
    if axes:
        nodes += [
            helper.make_node("Unsqueeze", ["row", "last"], ["column"]),
            helper.make_node("Expand", ["column", "axes"], ["position_ids"]),
        ]
    return nodes


def _int64(name: str, value: int | list[int]) -> onnx.TensorProto:
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(value, np.int64), name)
