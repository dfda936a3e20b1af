"""The graphs of a base model: which modules are traced, with which inputs, outputs and dynamic axes.

The traced model runs unchanged around the kit's attention and masks. See docs/decisions/0003-base-exporter.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adalink.export.architectures import Architecture, cache_shape, mask_windows
from adalink.export.tracing.graph import Axes, TracedGraph
from adalink.runtime.storage.manifest import Cache
from adalink.training.models.loading import max_positions
from adalink.training.models.stand_ins import StandIns

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Sizes of the traced example: all different, so that a size baked into the graph shows.
_BATCH, _SEQUENCE, _PAST, _SOURCE = 2, 3, 4, 5


def traced_graphs(
    model: PreTrainedModel,
    architecture: Architecture,
    *,
    grouped: bool,
    token_types: bool = False,
    stand_ins: StandIns | None = None,
) -> dict[str, TracedGraph]:
    """The graphs of a base by file stem: ``model``, and for an encoder-decoder also ``decoder``.

    Args:
        model: the base.
        architecture: its entry in the registry.
        grouped: whether a decoder computes attention with ``GroupQueryAttention``.
        token_types: whether an encoder takes ``token_type_ids``.
        stand_ins: what the model's matrices stand for.
    """
    known = stand_ins or StandIns()
    graphs = _graphs(model, architecture, grouped, token_types, known)
    return {stem: dataclasses.replace(graph, stand_ins=known) for stem, graph in graphs.items()}


def _graphs(
    model: PreTrainedModel, architecture: Architecture, grouped: bool, token_types: bool, stand_ins: StandIns
) -> dict[str, TracedGraph]:
    from adalink.export.base.modules import CrossDecoderGraph, DecoderGraph, EncoderGraph

    if architecture.kind == "encoder":
        return {"model": _encoder_graph(EncoderGraph(model.base_model), model, token_types)}
    cache = cache_shape(model.config, architecture)
    assert cache is not None
    if architecture.kind == "decoder" and grouped:
        return {"model": _grouped_decoder_graph(model, architecture, cache, stand_ins)}
    if architecture.kind == "decoder":
        module = DecoderGraph(model, mask_windows(model.config, architecture), architecture.bidirectional_prompt)
        return {"model": _decoder_graph(module, model, architecture, cache)}
    return {
        "model": _encoder_graph(EncoderGraph(model.get_encoder()), model, token_types=False),
        "decoder": _cross_decoder_graph(CrossDecoderGraph(model), model, cache),
    }


def _encoder_graph(module: torch.nn.Module, model: PreTrainedModel, token_types: bool) -> TracedGraph:
    import torch

    inputs = {
        "inputs_embeds": _example(model, _BATCH, _SEQUENCE, model.get_input_embeddings().weight.shape[1]),
        "attention_mask": torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64),
    }
    if token_types:
        inputs["token_type_ids"] = torch.tensor([[0, 0, 1], [0, 1, 1]])
    return TracedGraph(
        module=module,
        inputs=inputs,
        outputs=["last_hidden_state"],
        axes=_axes((*inputs, "last_hidden_state"), {0: "batch", 1: "sequence"}),
    )


def _decoder_graph(
    module: torch.nn.Module, model: PreTrainedModel, architecture: Architecture, cache: Cache
) -> TracedGraph:
    past, present, axes = _cache_signature(model, cache)
    inputs = _token_inputs(model) | {"position_ids": _positions(architecture)} | past
    axes |= {"position_ids": {0: "batch", 1: "sequence"}}
    return TracedGraph(module, inputs, ["logits", *present], axes)


def _grouped_decoder_graph(
    model: PreTrainedModel, architecture: Architecture, cache: Cache, stand_ins: StandIns
) -> TracedGraph:
    import torch

    from adalink.export.base.grouped_attention import GroupedDecoderGraph

    windows, limit = mask_windows(model.config, architecture), max_positions(model)
    module = GroupedDecoderGraph(model, windows, limit, architecture.position_axes, stand_ins)
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
    module.find_packed(*(inputs | past).values())
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
    """Example past tensors, names of the present ones, and dynamic axes of a decoder's inputs and outputs."""
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
