"""Embedder graphs: token ids or embeddings to adapted embeddings, in front of a base on a GPU.

They serve any task: embedding table, adapter weights and task index are inputs. They are compiled once, with the base.
Switching tasks binds other memory or writes another index (docs/concepts/file-formats.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.export.adapter.nodes import INPUT_NAME, OUTPUT_NAME, edge_type, finish_model, residual_nodes
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import onnx

# Input of an embedder: token ids, which it looks up itself, or embeddings of any modality.
SOURCES = ("ids", "embeds")
EMBEDDERS = tuple(f"{activation}.{source}" for activation in ACTIVATIONS for source in SOURCES)


def build_embedder_graph(embedder: str, base: Base) -> onnx.ModelProto:
    """Build and check one embedder.

    Inputs of ``<activation>.ids``: ``input_ids`` int64 ``(batch, sequence)`` and ``table`` ``(vocab, d)`` in the base's
    dtype. Of ``<activation>.embeds``: ``inputs_embeds`` ``(batch, sequence, d)`` in the base's dtype and ``is_adapted``
    bool ``(batch, sequence)``. Of both: ``task_index`` int64 ``(batch,)``, the slot of each row, and
    float32 weights: ``down`` ``(slots, rank, d)``, ``up`` ``(slots, d, rank)``, ``down_bias`` ``(slots, 1, rank)`` and
    ``up_bias`` ``(slots, 1, d)``, zeros where a task has none; a smaller rank is padded with zeros.

    Output: ``adapted_embeds`` ``(batch, sequence, d)`` in the base's dtype. Rows with ``task_index`` 0, whatever slot 0
    holds, and positions that are not adapted pass bit for bit. Everything else is computed in float32.

    Args:
        embedder: one of ``EMBEDDERS``.
        base: the base contract.
    """
    from onnx import TensorProto, helper

    activation, _, source = embedder.partition(".")
    dtype, width = edge_type(base.embedding_dtype), base.hidden_size
    weights: dict[str, list[str | int | None]] = {
        "down": ["slots", "rank", width],
        "up": ["slots", width, "rank"],
        "down_bias": ["slots", 1, "rank"],
        "up_bias": ["slots", 1, width],
    }
    inputs = [helper.make_tensor_value_info("task_index", TensorProto.INT64, ["batch"])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in weights.items()]
    initializers = [_int64("zero", 0), _int64("behind", [1, 2])]
    nodes = [
        helper.make_node("Greater", ["task_index", "zero"], ["has_task"]),
        helper.make_node("Unsqueeze", ["has_task", "behind"], ["row_changes"]),
    ]
    changes = "row_changes"
    shape: list[str | int | None] = ["batch", "sequence", width]
    if source == "ids":
        inputs[:0] = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("table", dtype, [base.vocab_size, width]),
        ]
        nodes.append(helper.make_node("Gather", ["table", "input_ids"], [INPUT_NAME], axis=0))
    else:
        inputs[:0] = [
            helper.make_tensor_value_info(INPUT_NAME, dtype, shape),
            helper.make_tensor_value_info("is_adapted", TensorProto.BOOL, ["batch", "sequence"]),
        ]
        initializers.append(_int64("last_axis", [2]))
        changes = "changes"
        nodes += [
            helper.make_node("Unsqueeze", ["is_adapted", "last_axis"], ["position_changes"]),
            helper.make_node("And", ["row_changes", "position_changes"], [changes]),
        ]
    nodes += [helper.make_node("Gather", [name, "task_index"], [f"{name}_of_row"], axis=0) for name in weights]
    nodes += [
        helper.make_node("Transpose", [f"{name}_of_row"], [f"{name}_t"], perm=[0, 2, 1]) for name in ("down", "up")
    ]
    wide, adapted = INPUT_NAME, "adapted"
    if dtype != TensorProto.FLOAT:
        wide = "x"
        nodes.append(helper.make_node("Cast", [INPUT_NAME], [wide], to=TensorProto.FLOAT))
    nodes += residual_nodes("", wide, "down_t", "up_t", ("down_bias_of_row", "up_bias_of_row"), activation)
    if dtype != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [adapted], ["adapted_narrow"], to=dtype))
        adapted = "adapted_narrow"
    nodes.append(helper.make_node("Where", [changes, adapted, INPUT_NAME], [OUTPUT_NAME]))
    graph = helper.make_graph(
        nodes,
        name="adalink_front",
        inputs=inputs,
        outputs=[helper.make_tensor_value_info(OUTPUT_NAME, dtype, shape)],
        initializer=initializers,
    )
    return finish_model(graph, {"front": embedder})


def _int64(name: str, value: int | list[int]) -> onnx.TensorProto:
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(value, np.int64), name)
