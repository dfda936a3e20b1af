"""Registry of the model types that can be exported, and the particulars of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.manifest import Cache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BARE_MASK = ""


@dataclass(frozen=True)
class Architecture:
    """One model type, as far as export needs to know it.

    Attributes:
        kind: one of ``adalink.runtime.storage.manifest.BASE_KINDS``.
        masks_by_layer_type: whether the model takes a mask per layer type (``{"full_attention": ...}``) or a bare one.
        windowed: whether the bare mask ends at the config's ``sliding_window``.
        scales_embeddings: whether the embedding module multiplies a row of its matrix by the root of the width.
        bidirectional_prompt: whether prompt positions attend to the whole prompt and only later ones causally; a
            property of the model, not of its type.
        position_axes: numbers in a position id; 3 where positions follow the grid of an image
            (``adalink.runtime.vision.mrope``).
    """

    kind: str
    masks_by_layer_type: bool = False
    windowed: bool = False
    scales_embeddings: bool = False
    bidirectional_prompt: bool = False
    position_axes: int = 1


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("encoder"),
    "distilbert": Architecture("encoder"),
    "roberta": Architecture("encoder"),
    "xlm-roberta": Architecture("encoder"),
    "gpt2": Architecture("decoder"),
    "llama": Architecture("decoder"),
    "mistral": Architecture("decoder", windowed=True),
    "phi3": Architecture("decoder", windowed=True),
    "qwen2": Architecture("decoder", masks_by_layer_type=True),
    "qwen3": Architecture("decoder", masks_by_layer_type=True),
    "gemma": Architecture("decoder", scales_embeddings=True),
    "qwen2_vl_text": Architecture("decoder", masks_by_layer_type=True, position_axes=3),
    "qwen2_5_vl_text": Architecture("decoder", masks_by_layer_type=True, position_axes=3),
    "gemma3_text": Architecture("decoder", masks_by_layer_type=True, scales_embeddings=True),
    "t5": Architecture("encoder-decoder"),
}

# Settings of a config that a graph behind `inputs_embeds` cannot honour, and why.
_NEEDS_TOKEN_IDS = "its layers look token ids up again (per-layer embeddings), so embeddings alone do not determine it"
_ROPE_BY_LENGTH = "its rotary table follows the longest row of a batch, so a row would depend on its neighbours"
_CHUNKS_TRACED = "and a graph would have as many as the traced example; set it to 0, which computes the same"


def architecture_of(model: PreTrainedModel, *, bidirectional_prompt: bool = False) -> Architecture:
    """The registry's entry for ``model``.

    Args:
        model: the model to export; of one that takes images, its language model.
        bidirectional_prompt: whether prompt positions attend to the whole prompt.

    Raises:
        ModelError: the type is not supported, the model needs token ids inside, has no language model head where its
            kind needs one, or its config asks for something that the graph cannot express.
    """
    config = model.config
    name = config.model_type
    text_config = config.get_text_config()
    if getattr(text_config, "hidden_size_per_layer_input", None):
        raise ModelError(f"model type {name!r} cannot be exported behind inputs_embeds: {_NEEDS_TOKEN_IDS}")
    check_model_type(name)
    architecture = ARCHITECTURES[name]
    if reason := _unexpressible(config, architecture, bidirectional_prompt):
        raise ModelError(f"this {name} model cannot be exported: {reason}")
    if architecture.kind != "encoder" and model.get_output_embeddings() is None:
        raise ModelError(
            f"{type(model).__name__} has no language model head; expected the model that gives logits, such as one "
            "loaded with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    return replace(architecture, bidirectional_prompt=bidirectional_prompt)


def check_model_type(name: object) -> None:
    """Refuse a ``model_type`` that is not in the registry; raises ``ModelError``."""
    if name not in ARCHITECTURES:
        raise ModelError(
            f"model type {name!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}. "
            "A new one needs an entry in adalink.export.architectures and its parity test"
        )


def embedding_scale(name: str, hidden_size: int) -> float:
    """The factor by which a model's embedding module multiplies a row of its matrix: a float32 number."""
    return float(np.float32(math.sqrt(hidden_size))) if ARCHITECTURES[name].scales_embeddings else 1.0


def mask_windows(config: PretrainedConfig, architecture: Architecture) -> dict[str, int | None]:
    """Attention windows by mask name; ``BARE_MASK`` is the name of a single bare mask."""
    if not architecture.masks_by_layer_type:
        return {BARE_MASK: getattr(config, "sliding_window", None) if architecture.windowed else None}
    window = getattr(config, "sliding_window", None)
    return {name: window if name == "sliding_attention" else None for name in sorted({*config.layer_types})}


def cache_shape(config: PretrainedConfig, architecture: Architecture) -> Cache | None:
    """Shape of the KV cache; ``None`` for encoders."""
    if architecture.kind == "encoder":
        return None
    names = _normalized(config)
    heads = names.num_attention_heads
    layers = getattr(config, "num_decoder_layers", None) or names.num_layers
    return Cache(
        layers=layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(names, "head_dim", None) or names.hidden_size // heads,
    )


def _normalized(config: PretrainedConfig) -> Any:
    """Optimum's view of the config, with the same attribute names for every type it knows."""
    from optimum.utils import NormalizedConfigManager, NormalizedTextConfig

    try:
        return NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        return NormalizedTextConfig(config)


def _unexpressible(config: PretrainedConfig, architecture: Architecture, bidirectional_prompt: bool) -> str | None:
    """Why settings of the config rule out the export, or ``None``."""
    ropes = getattr(config, "rope_parameters", None) or {}
    rope_types = {str(rope.get("rope_type")) for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    if bad := sorted(rope_types & {"dynamic", "longrope"}):
        return f"rope type {bad[0]!r}: {_ROPE_BY_LENGTH}"
    if getattr(config, "use_bidirectional_attention", None) and not bidirectional_prompt:
        return "its decoder attends in both directions (use_bidirectional_attention), which a KV cache cannot serve"
    if architecture.kind == "encoder" and getattr(config, "is_decoder", False):
        return "it is an encoder type configured as a decoder (is_decoder)"
    if architecture.kind == "encoder" and getattr(config, "chunk_size_feed_forward", None):
        return f"its feed-forward blocks are computed in chunks (chunk_size_feed_forward), {_CHUNKS_TRACED}"
    if getattr(config, "add_cross_attention", False):
        return "it has cross attention to another model (add_cross_attention)"
    return None
