"""The adapter as ONNX nodes, for task graphs and bank graphs: float32 inside, any dtype outside."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

OPSET = 20
# The first IR version that goes with opset 20: older runtimes read it too.
IR_VERSION = 9
INPUT_NAME = "inputs_embeds"
OUTPUT_NAME = "adapted_embeds"


def edge_type(dtype: str) -> int:
    """ONNX element type of a graph's input and output."""
    from onnx import TensorProto

    return {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]


def residual_nodes(
    prefix: str, source: str, down: str, up: str, biases: tuple[str, str] | None, activation: str
) -> list[onnx.NodeProto]:
    """Nodes of ``<prefix>adapted = source + up(act(down(source)))``.

    Args:
        prefix: prefix of every new value's name.
        source: name of the input, float32 with shape ``(batch, sequence, d)``.
        down: name of the matrix with shape ``(…, d, r)``.
        up: name of the matrix with shape ``(…, r, d)``.
        biases: names of the biases of ``down`` and ``up``.
        activation: one of ``adalink.runtime.storage.adapter.ACTIVATIONS``.
    """
    from onnx import helper

    nodes, current = [], source

    def add(operator: str, inputs: list[str], output: str, **attributes: str) -> None:
        nonlocal current
        current = f"{prefix}{output}"
        nodes.append(helper.make_node(operator, inputs, [current], **attributes))

    add("MatMul", [current, down], "hidden")
    if biases is not None:
        add("Add", [current, biases[0]], "hidden_biased")
    match activation:
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
    add("MatMul", [current, up], "delta")
    if biases is not None:
        add("Add", [current, biases[1]], "delta_biased")
    add("Add", [source, current], "adapted")
    return nodes


def finish_model(graph: onnx.GraphProto, metadata: dict[str, str]) -> onnx.ModelProto:
    """A checked model of ``graph``, with ``metadata`` and the kit's version; raises what onnx's checker raises."""
    import onnx
    from onnx import helper

    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="adalink-kit"
    )
    helper.set_model_props(model, {**metadata, "kit_version": _kit_version()})
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    return model


@functools.cache
def _kit_version() -> str:
    return version("adalink-kit")
