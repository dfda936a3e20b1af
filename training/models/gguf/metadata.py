"""Metadata of a GGUF file against the config that transformers made of it: each key is used, put right or refused.

transformers' reader has one table of keys for each architecture and drops the others. So the value of every key is
compared with the config here, whoever read it. What the model class takes is set where it was dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalink.runtime.errors import ModelError
from adalink.training.models.gguf.header import GgufHeader, read_float32
from adalink.training.models.gguf.rope import ROPE_KEYS, head_width, rope_parameters
from adalink.training.models.gguf.t5 import repair_t5

# GGUF architectures whose every key and tensor is known here.
ARCHITECTURES = ("gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3", "t5")
ROPE_TENSOR = "rope_freqs.weight"
_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
# Keys about the file, its making and its tensors' layout, which do not change what the model computes.
_HARMLESS = ("tensor_data_layout", "pooling_type", "rope.scaling.finetuned")
_FOREIGN = ("adapter.", "clip.", "diffusion.", "split.", "xielu.")
# Gemma scales queries by the width of a head, but for the models of 27 billion parameters: (architecture, layers).
_SCALED_BY_HEADS = {("gemma3", 62)}
_ROTARY = ("gemma3", "llama", "phi3", "qwen2", "qwen3")


@dataclass(frozen=True)
class _Key:
    """A key below the architecture's name.

    Attributes:
        attributes: names of the setting on a config; the first that it has counts.
        neutral: values that mean the same as no such key.
        is_set: whether the setting may be changed after the config was made; otherwise it is compared alone.
    """

    attributes: tuple[str, ...] = ()
    neutral: tuple[Any, ...] = ()
    is_set: bool = False


_KEYS = {
    "block_count": _Key(("num_hidden_layers",)),
    "decoder_block_count": _Key(("num_decoder_layers",), is_set=True),
    "decoder_start_token_id": _Key(("decoder_start_token_id",), is_set=True),
    "context_length": _Key(("max_position_embeddings", "n_positions"), is_set=True),
    "embedding_length": _Key(("hidden_size",)),
    "feed_forward_length": _Key(("intermediate_size", "n_inner", "d_ff"), is_set=True),
    "vocab_size": _Key(("vocab_size",)),
    "attention.head_count": _Key(("num_attention_heads",)),
    "attention.head_count_kv": _Key(("num_key_value_heads", "num_attention_heads")),
    "attention.layer_norm_rms_epsilon": _Key(_EPSILONS, is_set=True),
    "attention.layer_norm_epsilon": _Key(_EPSILONS, is_set=True),
    "attention.relative_buckets_count": _Key(("relative_attention_num_buckets",), is_set=True),
    "attention.causal": _Key(neutral=(True,)),
    "attention.clamp_kqv": _Key(neutral=(0.0,)),
    "attention.max_alibi_bias": _Key(neutral=(0.0,)),
    "attention.output_scale": _Key(neutral=(0.0, 1.0)),
    "attn_logit_softcapping": _Key(("attn_logit_softcapping",), neutral=(0.0,), is_set=True),
    "final_logit_softcapping": _Key(("final_logit_softcapping",), neutral=(0.0,), is_set=True),
    "logit_scale": _Key(neutral=(0.0, 1.0)),
    "residual_scale": _Key(neutral=(0.0, 1.0)),
    "expert_count": _Key(neutral=(0,)),
    "expert_used_count": _Key(neutral=(0,)),
    "expert_shared_count": _Key(neutral=(0,)),
    "rope.scaling.yarn_log_multiplier": _Key(neutral=(0.0,)),
    "rope.scaling.yarn_ext_factor": _Key(neutral=(-1.0, 1.0)),
    "rope.scaling.yarn_attn_factor": _Key(neutral=(1.0,)),
    "rope.scaling.alpha": _Key(neutral=(0.0,)),
}


def repair_config(header: GgufHeader, path: Path, config: Any) -> None:
    """Put a config right, in place, where transformers dropped what the file says.

    Args:
        header: the file's header.
        path: the file, for the small tensors among its settings.
        config: what transformers made of it.

    Raises:
        ModelError: the architecture or a key is unknown, or its value is not one that the model class can take.
    """
    name, architecture = header.name, header.architecture
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"base model {name}: its architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}: "
            "settings of others would be dropped when it is loaded; export the original checkpoint instead"
        )
    _check_namespaces(header)
    if architecture == "t5":
        repair_t5(header, config)
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    rope = {key.removeprefix("rope."): keys.pop(key) for key in list(keys) if key.removeprefix("rope.") in ROPE_KEYS}
    _take_heads(name, keys, config)
    _take_attention(name, architecture, keys, config)
    for key, value in keys.items():
        if key not in _HARMLESS:
            _take(name, architecture, key, value, config)
    if architecture in _ROTARY:
        _take_rope(header, path, rope, config)
    elif rope:
        raise _refusal(name, f"{prefix}rope.{next(iter(rope))}", "the model has no rotary positions")


def _check_namespaces(header: GgufHeader) -> None:
    for key, value in header.metadata.items():
        if key.startswith(_FOREIGN) and not (key == "split.count" and value in (0, 1)) and key != "split.no":
            raise _refusal(header.name, key, "it is a part of a model, or not a language model alone")
    if (kind := header.metadata.get("general.type", "model")) != "model":
        raise _refusal(header.name, "general.type", f"it is {kind!r}, expected 'model'")


def _take(file: str, architecture: str, key: str, value: Any, config: Any) -> None:
    """One key: equal to the config's setting, set there, or refused."""
    rule = _KEYS.get(key)
    full = f"{architecture}.{key}"
    if rule is None:
        raise _refusal(file, full, f"it is {_shown(value)}, and no such setting is known")
    attribute = next((name for name in rule.attributes if hasattr(config, name)), None)
    if attribute is None:
        if value not in rule.neutral:
            raise _refusal(file, full, f"it is {_shown(value)}, and the model class has no such setting")
        return
    current = getattr(config, attribute)
    if _is_equal(value, current) or (value in rule.neutral and not current):
        return
    if not rule.is_set or isinstance(value, list):
        raise _refusal(file, full, f"it is {_shown(value)}, and the model is built with {attribute} {current!r}")
    setattr(config, attribute, value)


def _take_heads(file: str, keys: dict[str, Any], config: Any) -> None:
    """The widths of keys and values: of one head, and the same."""
    for key in ("attention.key_length", "attention.value_length"):
        width = keys.pop(key, None)
        if width is None or width == head_width(config):
            continue
        if config.model_type == "gpt2" or key == "attention.value_length":
            raise _refusal(file, key, f"it is {_shown(width)}, and the model is built with {head_width(config)}")
        config.head_dim = width  # every class with rotary positions looks for it


def _take_attention(file: str, architecture: str, keys: dict[str, Any], config: Any) -> None:
    """The scale and the window of attention, which model classes have in different ways."""
    scale = keys.pop("attention.scale", None)
    expected = 1.0 if architecture == "t5" else 1 / math.sqrt(head_width(config))
    if hasattr(config, "query_pre_attn_scalar"):
        by_heads = (architecture, config.num_hidden_layers) in _SCALED_BY_HEADS
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if by_heads else head_width(config)
        )
        expected = config.query_pre_attn_scalar**-0.5
    if scale not in (None, 0.0) and not math.isclose(scale, expected, rel_tol=1e-5):
        raise _refusal(
            file, f"{architecture}.attention.scale", f"it is {scale}, and the model is built with {expected}"
        )
    window = keys.pop("attention.sliding_window", None)
    pattern = keys.pop("attention.sliding_window_pattern", None)
    layers = getattr(config, "layer_types", None)
    if pattern is not None and architecture == "gemma3":
        layers = config.layer_types = _layer_types(pattern, config.num_hidden_layers)
    if window is not None and "sliding_attention" in (layers or ()):
        config.sliding_window = window
    elif window is not None and architecture == "phi3":
        config.sliding_window = window if window else None
    elif window and window < keys.get("context_length", math.inf):
        raise _refusal(file, f"{architecture}.attention.sliding_window", f"it is {window}, and the model has no window")
    if pattern is not None and architecture != "gemma3" and window:
        raise _refusal(file, f"{architecture}.attention.sliding_window_pattern", f"it is {_shown(pattern)}")


def _layer_types(pattern: Any, layers: int) -> list[str]:
    """The kind of each layer: the file flags those with a window, or says every how many there is one without."""
    flags = pattern if isinstance(pattern, list) else [pattern == 0 or (index + 1) % pattern for index in range(layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in flags]


def _take_rope(header: GgufHeader, path: Path, rope: Mapping[str, Any], config: Any) -> None:
    divisors = None
    if (place := header.tensors.get(ROPE_TENSOR)) is not None and (divisors := read_float32(path, place)) is None:
        raise ModelError(f"base model {header.name}: its tensor {ROPE_TENSOR} is not of float32: download it again")
    parameters = rope_parameters(rope, config, divisors, header.name)
    current = config.rope_parameters
    if "full_attention" not in current:
        config.rope_parameters = parameters
        if "freq_base_swa" in rope:
            raise _refusal(header.name, f"{header.architecture}.rope.freq_base_swa", "the model has no such layers")
        return
    local = {**current["sliding_attention"], "rope_theta": float(rope.get("freq_base_swa", 10000.0))}
    config.rope_parameters = {"full_attention": parameters, "sliding_attention": local}


def _is_equal(value: Any, current: Any) -> bool:
    if isinstance(value, list):  # one value a layer
        return bool(value) and all(_is_equal(item, current) for item in value)
    if isinstance(value, float) and isinstance(current, (int, float)):
        return math.isclose(value, current, rel_tol=1e-6)
    return bool(value == current)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refusal(file: str, key: str, reason: str) -> ModelError:
    return ModelError(
        f"base model {file}: its metadata key {key} would be dropped: {reason}. Expected keys that the model class can "
        "take: export the original checkpoint instead, or convert it again"
    )
