"""Tracing: a PyTorch module to an ONNX graph, with its weights in a file beside it.

The module may have stand-ins for its matrices. No matrix is in memory while the graph is made.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adalink.export.tracing.fold_weights import fold_weights
from adalink.export.tracing.graph_weights import GraphWeight, Progress, WeightedGraph, placeholder, tensor_of
from adalink.export.tracing.static_shapes import make_reshapes_static
from adalink.runtime.errors import GraphError
from adalink.training.models.stand_ins import StandIns

if TYPE_CHECKING:
    import onnx

OPSET = 20
# The one operator that is not standard, in graphs for ONNX Runtime alone (adalink.export.base.grouped_attention).
DOMAIN, OPERATOR = "com.microsoft", "GroupQueryAttention"

Axes = dict[int, str]


@dataclass(frozen=True)
class TracedGraph:
    """One graph to trace.

    Attributes:
        module: module that takes the inputs and returns the outputs, as flat tensors in order.
        inputs: example tensors by name.
        outputs: names of the outputs.
        axes: dynamic axes by input or output name.
        is_grouped: whether its attention is ``GroupQueryAttention``, which is not in the ONNX standard.
        stand_ins: what the module's matrices stand for.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: list[str]
    axes: dict[str, Axes]
    is_grouped: bool = False
    stand_ins: StandIns = field(default_factory=StandIns)


def write_graph(
    graph: TracedGraph, path: Path, metadata: dict[str, str], progress: Progress = lambda line: None
) -> None:
    """Trace ``graph`` into ``path``, with its weights in ``<path>.data``.

    Args:
        graph: the graph to trace; its module computes attention with ``adalink.export.tracing.attention``.
        path: file to write, new.
        metadata: properties to record in the graph.
        progress: callback, called with one line now and then.

    Raises:
        GraphError: the graph has operators that are neither standard nor known.
    """
    save_graph(trace(graph, path.name, metadata), path, progress)


def save_graph(graph: WeightedGraph, path: Path, progress: Progress = lambda line: None) -> None:
    """Write a graph as ``path``, with its weights in ``<path>.data``, and check it."""
    import onnx

    graph.save(path, progress)
    onnx.checker.check_model(str(path))


def trace(graph: TracedGraph, name: str, metadata: dict[str, str]) -> WeightedGraph:
    """Trace ``graph``; its matrices are not read.

    Args:
        graph: as for ``write_graph``.
        name: file name of the graph, for errors.
        metadata: properties to record in the graph.

    Raises:
        GraphError: the graph has operators that are neither standard nor known.
    """
    import onnx

    weights = _named_weights(graph.module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.onnx"
        with torch.no_grad(), quiet_exporter():
            torch.onnx.export(
                _WithWeights(graph.module, list(weights.values())).eval(),  # the exporter restores the mode of all
                (*(weight.detach() for weight in weights.values()), *graph.inputs.values()),
                str(path),
                input_names=[*weights, *graph.inputs],
                output_names=graph.outputs,
                dynamic_axes=graph.axes,
                opset_version=OPSET,
                custom_opsets={DOMAIN: 1} if graph.is_grouped else None,  # PyTorch warns of one that is not used
                dynamo=False,
                export_params=False,
                do_constant_folding=False,  # there are no constants but small ones, see fold_weights
            )
        model = onnx.load(path)
    _check_operators(model, name)
    matrices = _take_weights(model, graph, weights)
    fold_weights(model, matrices)
    _name_attention_shapes(model)
    make_reshapes_static(model)
    model.producer_name = "adalink-kit"
    onnx.helper.set_model_props(model, metadata)
    return WeightedGraph(model, matrices)


def _named_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module; what is tied has its first name alone."""
    names: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name] for name in names.values()}


class _WithWeights(torch.nn.Module):
    """A module whose weights are its first inputs: of weights as parameters the exporter makes copies."""

    def __init__(self, module: torch.nn.Module, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.graph = module
        self._weights = weights

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The module's outputs, with the weights and its own inputs in turn."""
        given = {id(weight): tensor for weight, tensor in zip(self._weights, inputs, strict=False)}
        owners: list[dict[str, Any]] = [
            owner for module in self.graph.modules() for owner in (module._parameters, module._buffers)
        ]
        before = [dict(owner) for owner in owners]
        try:
            for owner in owners:
                owner.update({name: given[id(value)] for name, value in owner.items() if id(value) in given})
            return self.graph(*inputs[len(self._weights) :])
        finally:
            for owner, values in zip(owners, before, strict=True):
                owner.update(values)


def _take_weights(
    model: onnx.ModelProto, graph: TracedGraph, tensors: dict[str, torch.Tensor]
) -> dict[str, GraphWeight]:
    """Make initializers of the graph inputs that are weights: matrices without values, and vectors with theirs."""
    inputs = {value.name: value for value in model.graph.input}
    matrices = {}
    for name, tensor in tensors.items():
        if name not in inputs:
            continue
        weight = GraphWeight(graph.stand_ins.source(tensor), tensor.dtype)
        if tensor.dim() > 1:
            matrices[name] = weight
            initializer = placeholder(name, weight)
        else:
            initializer = tensor_of(name, weight.weight.read().to(weight.dtype))
        model.graph.initializer.append(initializer)
    del model.graph.input[:]
    model.graph.input.extend(inputs[name] for name in graph.inputs if name in inputs)
    return matrices


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings: that it is the older one, and that shapes are traced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx.*")
        yield


def _check_operators(model: onnx.ModelProto, name: str) -> None:
    known = {f"{DOMAIN}::{OPERATOR}"}
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain} - known)
    if foreign:
        raise GraphError(
            f"{name} uses {foreign[0]}, expected standard ONNX operators only: this model needs another export"
        )


def _name_attention_shapes(model: onnx.ModelProto) -> None:
    """Name the output shapes of grouped attention for shape inference, which knows standard operators only."""
    from onnx import helper

    graph = model.graph
    del graph.value_info[:]
    for node in graph.node:
        if node.op_type == OPERATOR:
            dtype = next(value for value in graph.input if value.name == "inputs_embeds").type.tensor_type.elem_type
            heads = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
            head_dim = next(v for v in graph.input if v.name == node.input[3]).type.tensor_type.shape.dim[3].dim_value
            shape = ["batch", "sequence", heads * head_dim]
            graph.value_info.append(helper.make_tensor_value_info(node.output[0], dtype, shape))
