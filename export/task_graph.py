"""An adapter as a self-contained ONNX graph: ``inputs_embeds -> adapted_embeds``.

ONNX forbids one name for two values, so the output is called ``adapted_embeds``; it replaces ``inputs_embeds`` in front
of the base. Standard operators only, float32 inside whatever the dtype outside, the same bytes for the same adapter.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.adapter import Adapter

if TYPE_CHECKING:
    import onnx

OPSET = 20
# The first IR version that goes with opset 20: older runtimes read it too.
_IR_VERSION = 9
OUTPUT_NAME = "adapted_embeds"


def build_task_graph(adapter: Adapter, task: str, dtype: str) -> onnx.ModelProto:
    """Build and check the graph of one adapter.

    Inputs: ``inputs_embeds`` with shape ``(batch, sequence, d)`` and, when the adapter has several modalities,
    ``modality``, int64 with shape ``(batch, sequence)``: the index in the adapter's list, -1 (or any other) for none.
    Positions of no modality pass bit for bit. Weights are initializers named as in the adapter, ``down`` and ``up``
    transposed.

    Args:
        adapter: a checked adapter.
        task: the name it is deployed under.
        dtype: of ``inputs_embeds`` and of the output.
    """
    import onnx
    from onnx import TensorProto, helper

    shape: list[str | int | None] = ["batch", "sequence", adapter.config.hidden_size]
    edge_type = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    inputs = [helper.make_tensor_value_info("inputs_embeds", edge_type, shape)]
    modalities = adapter.config.modalities
    if len(modalities) > 1:
        inputs.append(helper.make_tensor_value_info("modality", TensorProto.INT64, shape[:2]))
    nodes, result = [], "inputs_embeds"
    initializers = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), name) for name, weight in adapter.weights.items()
    ]
    if dtype != "float32":
        nodes.append(helper.make_node("Cast", ["inputs_embeds"], ["x"], to=TensorProto.FLOAT))
        result = "x"
    source = result
    for index, name in enumerate(modalities):
        nodes += _residual(adapter, name, source)
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
    if dtype != "float32":
        nodes.append(helper.make_node("Cast", [result], [OUTPUT_NAME], to=edge_type))
    else:
        nodes[-1].output[0] = OUTPUT_NAME
    graph = helper.make_graph(
        nodes,
        name="adalink_task",
        inputs=inputs,
        outputs=[helper.make_tensor_value_info(OUTPUT_NAME, edge_type, shape)],
        initializer=initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION, producer_name="adalink-kit"
    )
    helper.set_model_props(model, _metadata(adapter, task))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    return model


def _residual(adapter: Adapter, name: str, source: str) -> list[onnx.NodeProto]:
    """Nodes of ``<name>.adapted = source + up(act(down(source)))``."""
    from onnx import helper

    nodes, current = [], source

    def add(operator: str, inputs: list[str], output: str, **attributes: str) -> None:
        nonlocal current
        current = f"{name}.{output}"
        nodes.append(helper.make_node(operator, inputs, [current], **attributes))

    add("MatMul", [current, f"{name}.down.weight"], "down")
    if adapter.config.bias:
        add("Add", [current, f"{name}.down.bias"], "down_biased")
    match adapter.config.activation:
        case "identity":
            pass
        case "relu":
            add("Relu", [current], "activated")
        case "gelu":
            add("Gelu", [current], "activated", approximate="none")
        case "gelu_tanh":
            add("Gelu", [current], "activated", approximate="tanh")
        case "silu":
            before = current
            add("Sigmoid", [before], "gate")
            add("Mul", [before, current], "activated")
        case "tanh":
            add("Tanh", [current], "activated")
        case unknown:
            raise AssertionError(f"activation {unknown!r} has no operators")
    add("MatMul", [current, f"{name}.up.weight"], "up")
    if adapter.config.bias:
        add("Add", [current, f"{name}.up.bias"], "up_biased")
    add("Add", [source, current], "adapted")
    return nodes


def _metadata(adapter: Adapter, task: str) -> dict[str, str]:
    config = adapter.config
    return {
        "task": task,
        "rank": str(config.rank),
        "activation": config.activation,
        "scope": config.scope,
        "modalities": ",".join(config.modalities),
        "base_fingerprint": config.base_fingerprint,
        "adapter_digest": adapter.digest,
        "kit_version": version("adalink-kit"),
    }
