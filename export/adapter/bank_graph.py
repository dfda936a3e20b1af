"""Bank graphs: one adapter graph for all tasks with the same activation and bias. The weights are its inputs.

They are written once, with the base, and hold no task (docs/decisions/0006-bank.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.export.adapter.nodes import INPUT_NAME, OUTPUT_NAME, edge_type, finish_model, residual_nodes

if TYPE_CHECKING:
    import onnx


def build_bank_graph(activation_key: str, hidden_size: int, dtype: str) -> onnx.ModelProto:
    """Build and check the graph of one activation key.

    Inputs: ``inputs_embeds`` with shape ``(batch, sequence, d)``, and float32 weights as an adapter holds them:
    ``down`` ``(tasks, rank, d)``, ``up`` ``(tasks, d, rank)``, for a key with a bias also ``down_bias``
    ``(tasks, 1, rank)`` and ``up_bias`` ``(tasks, 1, d)``. ``tasks`` is ``batch``, or 1 for all rows.

    Args:
        activation_key: one of ``adalink.runtime.storage.adapter.ACTIVATION_KEYS``.
        hidden_size: ``d``.
        dtype: of ``inputs_embeds`` and of the output.
    """
    from onnx import TensorProto, helper

    activation = activation_key.removesuffix("_bias")
    has_bias = activation != activation_key
    shape: list[str | int | None] = ["batch", "sequence", hidden_size]
    shapes: dict[str, list[str | int | None]] = {
        "down": ["tasks", "rank", hidden_size],
        "up": ["tasks", hidden_size, "rank"],
    }
    if has_bias:
        shapes |= {"down_bias": ["tasks", 1, "rank"], "up_bias": ["tasks", 1, hidden_size]}
    nodes, source = [], INPUT_NAME
    if dtype != "float32":
        nodes.append(helper.make_node("Cast", [source], ["x"], to=TensorProto.FLOAT))
        source = "x"
    # ONNX Runtime makes one node of each transposition and its product, and copies nothing.
    nodes += [helper.make_node("Transpose", [name], [f"{name}_t"], perm=[0, 2, 1]) for name in ("down", "up")]
    biases = ("down_bias", "up_bias") if has_bias else None
    nodes += residual_nodes("", source, "down_t", "up_t", biases, activation)
    if dtype != "float32":
        nodes.append(helper.make_node("Cast", ["adapted"], [OUTPUT_NAME], to=edge_type(dtype)))
    else:
        nodes[-1].output[0] = OUTPUT_NAME
    graph = helper.make_graph(
        nodes,
        name="adalink_bank",
        inputs=[
            helper.make_tensor_value_info(INPUT_NAME, edge_type(dtype), shape),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, weight) for name, weight in shapes.items()),
        ],
        outputs=[helper.make_tensor_value_info(OUTPUT_NAME, edge_type(dtype), shape)],
    )
    return finish_model(graph, {"bank": activation_key})
