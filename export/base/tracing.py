"""A base model as ONNX graphs: which inputs and outputs each has, and how they are traced.

The traced model runs unchanged around our attention and masks. See docs/decisions/0003-base-exporter.md.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.base.architectures import Architecture, cache_shape, mask_windows
from adalink.export.base.static_shapes import make_reshapes_static
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.manifest import Cache
from adalink.training.models.loading import max_positions

if TYPE_CHECKING:
    import onnx
    import torch
    from transformers import PreTrainedModel

OPSET = 20
# The one operator that is not standard, in graphs for ONNX Runtime alone (adalink.export.base.grouped_attention).
DOMAIN, OPERATOR = "com.microsoft", "GroupQueryAttention"
# Sizes of the example that is traced: all different, so that one baked into the graph cannot pass for another.
_BATCH, _SEQUENCE, _PAST, _SOURCE = 2, 3, 4, 5

Axes = dict[int, str]


@dataclass(frozen=True)
class TracedGraph:
    """One graph to trace.

    Attributes:
        module: flat module; takes the inputs in order and returns the outputs in order.
        inputs: example tensors by name.
        outputs: names of the outputs.
        axes: dynamic axes by input or output name.
        is_grouped: whether its attention is ``GroupQueryAttention``, which is not of the ONNX standard.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: list[str]
    axes: dict[str, Axes]
    is_grouped: bool = False


def traced_graphs(model: PreTrainedModel, architecture: Architecture, *, grouped: bool) -> dict[str, TracedGraph]:
    """The graphs of a base by file stem: ``model``, and for an encoder-decoder also ``decoder``.

    Args:
        model: the base.
        architecture: its entry.
        grouped: whether a decoder attends with ``GroupQueryAttention``.
    """
    from adalink.export.base.modules import CrossDecoderGraph, DecoderGraph, EncoderGraph

    if architecture.kind == "encoder":
        return {"model": _encoder_graph(EncoderGraph(model.base_model), model)}
    cache = cache_shape(model.config, architecture)
    assert cache is not None
    if architecture.kind == "decoder" and grouped:
        return {"model": _grouped_decoder_graph(model, architecture, cache)}
    if architecture.kind == "decoder":
        module = DecoderGraph(model, mask_windows(model.config, architecture), architecture.bidirectional_prompt)
        return {"model": _decoder_graph(module, model, architecture, cache)}
    return {
        "model": _encoder_graph(EncoderGraph(model.get_encoder()), model),
        "decoder": _cross_decoder_graph(CrossDecoderGraph(model), model, cache),
    }


def write_graph(graph: TracedGraph, path: Path, metadata: dict[str, str]) -> None:
    """Trace ``graph`` into ``path``, with its weights in ``<path>.data``.

    Args:
        graph: what to trace; its module computes attention with ``adalink.export.base.attention``.
        path: file to write, new.
        metadata: properties to record in the graph.

    Raises:
        GraphError: the graph has operators outside the ONNX standard that no runtime is known to have.
    """
    import onnx
    import torch

    # Beside the target, so that a full disk shows here; the exporter's own layout of large weights is not the kit's.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trace-") as folder:
        draft = Path(folder) / path.name
        with torch.no_grad(), quiet_exporter():
            torch.onnx.export(
                graph.module,
                tuple(graph.inputs.values()),
                str(draft),
                input_names=list(graph.inputs),
                output_names=graph.outputs,
                dynamic_axes=graph.axes,
                opset_version=OPSET,
                custom_opsets={DOMAIN: 1} if graph.is_grouped else None,  # PyTorch warns of one that is not used
                dynamo=False,
            )
        model = onnx.load(draft)
    _check_operators(model, path.name)
    _name_attention_shapes(model)
    make_reshapes_static(model)
    model.producer_name = "adalink-kit"
    onnx.helper.set_model_props(model, metadata)
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )
    onnx.checker.check_model(str(path))


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of itself: that it is the older one, and that shapes are traced."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx.*")
        yield


def _encoder_graph(module: torch.nn.Module, model: PreTrainedModel) -> TracedGraph:
    import torch

    return TracedGraph(
        module=module,
        inputs={
            "inputs_embeds": _example(model, _BATCH, _SEQUENCE, model.get_input_embeddings().weight.shape[1]),
            "attention_mask": torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64),
        },
        outputs=["last_hidden_state"],
        axes=_axes(("inputs_embeds", "attention_mask", "last_hidden_state"), {0: "batch", 1: "sequence"}),
    )


def _decoder_graph(
    module: torch.nn.Module, model: PreTrainedModel, architecture: Architecture, cache: Cache
) -> TracedGraph:
    past, present, axes = _cache_signature(model, cache)
    inputs = _token_inputs(model) | {"position_ids": _positions(architecture)} | past
    axes |= {"position_ids": {0: "batch", 1: "sequence"}}
    return TracedGraph(module, inputs, ["logits", *present], axes)


def _grouped_decoder_graph(model: PreTrainedModel, architecture: Architecture, cache: Cache) -> TracedGraph:
    import torch

    from adalink.export.base.grouped_attention import GroupedDecoderGraph

    windows, limit = mask_windows(model.config, architecture), max_positions(model)
    module = GroupedDecoderGraph(model, windows, limit, architecture.position_axes)
    past, present, axes = _cache_signature(model, cache)
    axes |= _axes(past, {0: "batch", 2: "capacity"}) | _axes(present, {0: "batch", 2: "capacity_after"})
    axes |= {"sequence_lengths": {0: "batch"}, "logits_at": {0: "places"}, "logits": {0: "places"}}
    inputs = {
        "inputs_embeds": _example(model, _BATCH, _SEQUENCE, model.get_input_embeddings().weight.shape[1]),
        "sequence_lengths": torch.full((_BATCH,), _PAST + _SEQUENCE, dtype=torch.int32),
        "logits_at": torch.arange(_SOURCE),
    }
    if not module.rotates:
        inputs["position_ids"] = _positions(architecture)
        axes |= {"position_ids": {0: "batch", 1: "sequence"}}
    return TracedGraph(module, inputs | past, ["logits", *present], axes, is_grouped=True)


def _cross_decoder_graph(module: torch.nn.Module, model: PreTrainedModel, cache: Cache) -> TracedGraph:
    import torch

    past, present, axes = _cache_signature(model, cache)
    source = {
        "encoder_hidden_states": _example(model, _BATCH, _SOURCE, model.config.d_model),
        "encoder_attention_mask": torch.ones(_BATCH, _SOURCE, dtype=torch.int64),
    }
    axes |= _axes(source, {0: "batch", 1: "source"})
    return TracedGraph(module, _token_inputs(model) | source | past, ["logits", *present], axes)


def _positions(architecture: Architecture) -> torch.Tensor:
    """Example position ids: int64 with shape ``(batch, sequence)``, or ``(batch, sequence, axes)``."""
    import torch

    positions = torch.arange(_PAST, _PAST + _SEQUENCE).repeat(_BATCH, 1)
    if architecture.position_axes == 1:
        return positions
    return positions.unsqueeze(-1) + torch.arange(architecture.position_axes)


def _token_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    import torch

    return {
        "inputs_embeds": _example(model, _BATCH, _SEQUENCE, model.get_input_embeddings().weight.shape[1]),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64),
    }


def _cache_signature(
    model: PreTrainedModel, cache: Cache
) -> tuple[dict[str, torch.Tensor], list[str], dict[str, Axes]]:
    """Example past tensors, names of the present ones, and the dynamic axes of all that a decoder takes and gives."""
    names = [f"{layer}.{part}" for layer in range(cache.layers) for part in ("key", "value")]
    past = {f"past_key_values.{name}": _example(model, _BATCH, cache.kv_heads, _PAST, cache.head_dim) for name in names}
    present = [f"present.{name}" for name in names]
    axes: dict[str, Axes] = {
        "inputs_embeds": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "logits": {0: "batch", 1: "sequence"},
    }
    axes |= _axes(past, {0: "batch", 2: "past"}) | _axes(present, {0: "batch", 2: "total"})
    return past, present, axes


def _axes(names: Iterable[str], axes: Axes) -> dict[str, Axes]:
    return {name: dict(axes) for name in names}


def _example(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def _check_operators(model: onnx.ModelProto, name: str) -> None:
    known = {f"{DOMAIN}::{OPERATOR}"}
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain} - known)
    if foreign:
        raise GraphError(
            f"{name} uses {foreign[0]}, expected standard ONNX operators only: this model needs another export"
        )


def _name_attention_shapes(model: onnx.ModelProto) -> None:
    """Tell shape inference, which knows standard operators only, what shape grouped attention gives."""
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
