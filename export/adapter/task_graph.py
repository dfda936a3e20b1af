"""Task graphs: an adapter as a self-contained ONNX graph, ``inputs_embeds -> adapted_embeds``.

The output replaces ``inputs_embeds`` of the base. ONNX forbids one name for two values, so it has its own. The graph
has standard operators only, computes in float32 whatever its dtype, and has the same bytes for the same adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adalink.export.adapter.nodes import INPUT_NAME, OUTPUT_NAME, edge_type, finish_model, residual_nodes
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, TABLE_NAME, Adapter
from adalink.runtime.storage.adapter_spec import settings_at_default, settings_of, show_setting
from adalink.runtime.storage.compressed_weights import by_dimension, is_compressed
from adalink.runtime.storage.head_spec import HEAD_BIAS, HEAD_WEIGHT
from adalink.runtime.storage.quantized_rows import quantize_rows

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

IDS_NAME = "input_ids"
_LOOKED_UP = (SOFT_PROMPT_NAME, TABLE_NAME)
_BEHIND_THE_BASE = (HEAD_WEIGHT, HEAD_BIAS)


def build_task_graph(adapter: Adapter, task: str, dtype: str) -> onnx.ModelProto:
    """Build and check the graph of one adapter.

    Inputs: ``inputs_embeds`` with shape ``(batch, sequence, d)`` and, when the adapter has several modalities,
    ``modality``, int64 with shape ``(batch, sequence)``: the index in the adapter's list, -1 (or any other) for none;
    with ``input`` ``"ids"`` also ``input_ids``, int64 with shape ``(batch, sequence)``. Positions of no modality pass
    bit for bit. With a soft prompt the output has shape ``(batch, soft_tokens + sequence, d)``. Weights are
    initializers named as in the adapter, ``down`` and ``up`` transposed.

    Args:
        adapter: a checked adapter.
        task: the name it is deployed under.
        dtype: of ``inputs_embeds`` and of the output.
    """
    import onnx
    from onnx import TensorProto, helper

    config = adapter.config
    shape: list[str | int | None] = ["batch", "sequence", config.hidden_size]
    inputs = [helper.make_tensor_value_info(INPUT_NAME, edge_type(dtype), shape)]
    modalities = config.modalities if config.rank else ()
    if len(modalities) > 1:
        inputs.append(helper.make_tensor_value_info("modality", TensorProto.INT64, shape[:2]))
    if config.input == "ids":
        inputs.append(helper.make_tensor_value_info(IDS_NAME, TensorProto.INT64, shape[:2]))
    nodes, result = [], INPUT_NAME
    initializers: list[onnx.TensorProto] = []
    for name, weight in adapter.weights.items():
        if config.weight_dtype != "float32" and is_compressed(name):
            initializers += _codes(name, weight, config.weight_dtype)
            nodes += _dequantize_nodes(name)
        elif name not in _BEHIND_THE_BASE:
            value = np.ascontiguousarray(weight if name in _LOOKED_UP else weight.T)
            initializers.append(onnx.numpy_helper.from_array(value, name))
    if dtype != "float32" and modalities:
        nodes.append(helper.make_node("Cast", [INPUT_NAME], ["x"], to=TensorProto.FLOAT))
        result = "x"
    source = result
    for index, name in enumerate(modalities):
        biases = (f"{name}.down.bias", f"{name}.up.bias") if config.bias else None
        down, up = f"{name}.down.weight", f"{name}.up.weight"
        if config.input == "ids":
            nodes += [
                helper.make_node("Gather", [TABLE_NAME, IDS_NAME], [f"{name}.hidden"], axis=0),
                helper.make_node("MatMul", [f"{name}.hidden", up], [f"{name}.delta"]),
                helper.make_node("Add", [source, f"{name}.delta"], [f"{name}.adapted"]),
            ]
        else:
            nodes += residual_nodes(f"{name}.", source, down, up, biases, config.activation)
        adapted = f"{name}.adapted"
        if len(modalities) > 1:
            initializers.append(onnx.numpy_helper.from_array(np.array(index, np.int64), f"{name}.index"))
            nodes += [
                helper.make_node("Equal", ["modality", f"{name}.index"], [f"{name}.here"]),
                helper.make_node("Unsqueeze", [f"{name}.here", "last_axis"], [f"{name}.mask"]),
                helper.make_node("Where", [f"{name}.mask", adapted, result], [f"{name}.merged"]),
            ]
            adapted = f"{name}.merged"
        result = adapted
    if len(modalities) > 1:
        initializers.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))
    if dtype != "float32" and modalities:
        nodes.append(helper.make_node("Cast", [result], ["rounded"], to=edge_type(dtype)))
        result = "rounded"
    if config.soft_tokens:
        nodes += _soft_prompt_nodes(result, dtype)
        initializers.append(onnx.numpy_helper.from_array(np.array([1, 1], np.int64), "soft.ones"))
        shape = ["batch", "total", config.hidden_size]
    if not nodes:  # a head alone
        nodes.append(helper.make_node("Identity", [INPUT_NAME], [OUTPUT_NAME]))
    nodes[-1].output[0] = OUTPUT_NAME
    graph = helper.make_graph(
        nodes,
        name="adalink_task",
        inputs=inputs,
        outputs=[helper.make_tensor_value_info(OUTPUT_NAME, edge_type(dtype), shape)],
        initializer=initializers,
    )
    return finish_model(graph, _metadata(adapter, task))


def _codes(name: str, weight: npt.NDArray[np.float32], weight_dtype: str) -> list[onnx.TensorProto]:
    """Codes and scales of a matrix that is multiplied transposed; ``int4`` has a byte a code here too."""
    from onnx import numpy_helper

    codes, scales = quantize_rows(np.ascontiguousarray(by_dimension(name, weight)), weight_dtype)
    is_up = name.endswith(".up.weight")
    return [
        numpy_helper.from_array(np.ascontiguousarray(codes if is_up else codes.T), f"{name}.codes"),
        numpy_helper.from_array(scales if is_up else np.ascontiguousarray(scales.T), f"{name}.scales"),
    ]


def _dequantize_nodes(name: str) -> list[onnx.NodeProto]:
    """Nodes that make the matrix ``name`` of its codes; an engine computes them once, as they have no input."""
    from onnx import TensorProto, helper

    return [
        helper.make_node("Cast", [f"{name}.codes"], [f"{name}.numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.numbers", f"{name}.scales"], [name]),
    ]


def _soft_prompt_nodes(embeds: str, dtype: str) -> list[onnx.NodeProto]:
    """The soft prompt, rounded to ``dtype``, before the positions of ``embeds`` in every row."""
    from onnx import helper

    return [
        helper.make_node("Shape", [INPUT_NAME], ["soft.batch"], start=0, end=1),
        helper.make_node("Concat", ["soft.batch", "soft.ones"], ["soft.shape"], axis=0),
        helper.make_node("Expand", [SOFT_PROMPT_NAME, "soft.shape"], ["soft.rows"]),
        helper.make_node("Cast", ["soft.rows"], ["soft.rounded"], to=edge_type(dtype)),
        helper.make_node("Concat", ["soft.rounded", embeds], ["soft.before"], axis=1),
    ]


def _metadata(adapter: Adapter, task: str) -> dict[str, str]:
    config = adapter.config
    silent = settings_at_default(config)
    return {
        "task": task,
        **{name: show_setting(value) for name, value in settings_of(config).items() if name not in silent},
        "base_fingerprint": config.base_fingerprint,
        "adapter_digest": adapter.digest,
    }
