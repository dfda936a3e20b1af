"""Graph pass: what the graph computes of its weights alone becomes weights.

PyTorch multiplies with transposed matrices, and Gemma adds one to the weights of its norms. Both are the same at each
run. So a transposed matrix is one that is written transposed, and a sum of vectors is computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.export.tracing.graph_weights import GraphWeight, onnx_type, placeholder, tensor_of

if TYPE_CHECKING:
    import onnx
    import torch


def fold_weights(model: onnx.ModelProto, weights: dict[str, GraphWeight]) -> None:
    """Replace nodes that depend on weights alone by initializers, in place.

    Requires initializers that are in ``weights``, or have their values. Ensures the same outputs for all inputs.

    Args:
        model: the graph.
        weights: its matrices by name; transposed ones are added, and those that nothing else uses removed.
    """
    graph = model.graph
    vectors = {t.name: _values(t) for t in graph.initializer if t.name not in weights and len(t.dims) == 1}
    vectors |= {node.output[0]: _values(node.attribute[0].t) for node in graph.node if _is_scalar(node)}
    parameters = {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    folded = []
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in weights and list(node.attribute[0].ints) == [1, 0]:
            name = renamed[node.output[0]] = f"{node.input[0]}.transposed"
            if name not in weights:
                weights[name] = weights[node.input[0]].turned()
                graph.initializer.append(placeholder(name, weights[name]))
        elif parameters.intersection(node.input) and (result := _computed(node, vectors)) is not None:
            vectors[node.output[0]] = result
            parameters.add(node.output[0])
            graph.initializer.append(tensor_of(node.output[0], result))
        else:
            continue
        folded.append(node)
    for node in folded:
        graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    drop_unused(graph, weights)


def _computed(node: onnx.NodeProto, vectors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Result of a sum or a cast of known vectors; ``None`` for any other node."""
    import torch

    if node.op_type not in ("Add", "Cast") or any(name not in vectors for name in node.input):
        return None
    operands = [vectors[name] for name in node.input]
    if node.op_type == "Add":
        return operands[0] + operands[1]
    dtypes = {onnx_type(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    dtype = dtypes.get(node.attribute[0].i)
    return None if dtype is None else operands[0].to(dtype)


def _is_scalar(node: onnx.NodeProto) -> bool:
    """Whether a node is a constant number."""
    return node.op_type == "Constant" and node.attribute[0].name == "value" and not node.attribute[0].t.dims


def _values(tensor: onnx.TensorProto) -> torch.Tensor:
    """Values of an initializer that has them in its own bytes."""
    import torch
    from onnx import numpy_helper

    if tensor.data_type == tensor.BFLOAT16:  # not a dtype of numpy
        return torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16).reshape(list(tensor.dims))
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


def drop_unused(graph: onnx.GraphProto, weights: dict[str, GraphWeight]) -> None:
    """Remove initializers that no node takes, in place."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name in weights.keys() - {tensor.name for tensor in kept}:
        del weights[name]
