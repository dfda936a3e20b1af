"""Rotary positions of a GGUF file, as a transformers config says them; transformers' own reader drops the scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    import numpy.typing as npt

# What llama.cpp takes where a file says nothing.
_BASE = 10000.0
# Llama 3.1 and later: the file holds the divisors of the frequencies, and not what they were computed from. All
# published models share three of the four numbers; the largest divisor is the fourth.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_KEYS = ("type", "factor", "attn_factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
# Keys, below `rope.`, that this module reads.
ROPE_KEYS = ("freq_base", "freq_base_swa", "dimension_count", "scale_linear", *(f"scaling.{key}" for key in _KEYS))


def rope_parameters(
    rope: Mapping[str, Any],
    config: Any,
    divisors: npt.NDArray[np.float32] | None,
    file: str,
) -> dict[str, Any]:
    """The ``rope_parameters`` of a model whose layers share one rotary embedding.

    Args:
        rope: the file's keys below ``rope.``, without that prefix.
        config: the transformers config, for the width of a head and the longest sequence.
        divisors: the tensor ``rope_freqs.weight``; ``None`` without one.
        file: the file's name, for messages.

    Raises:
        ModelError: the file scales positions in a way that is not known.
    """
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": float(rope.get("freq_base", _BASE))}
    head = head_width(config)
    rotated = int(rope.get("dimension_count", head))
    if rotated != head:
        parameters["partial_rotary_factor"] = rotated / head
    kind = str(rope.get("scaling.type", "linear"))
    factor = float(rope.get("scaling.factor", 0.0) or rope.get("scale_linear", 0.0) or 1.0)
    attention = float(rope.get("scaling.attn_factor", 1.0))
    if divisors is not None:
        if factor != 1.0 or attention != 1.0:
            raise ModelError(
                f"base model {file}: it has both the tensor rope_freqs.weight and rope.scaling.factor {factor}; "
                "expected one of them: export the original checkpoint instead"
            )
        return parameters | _llama3(divisors, parameters["rope_theta"], rotated, file)
    if kind == "yarn" and factor != 1.0:
        return parameters | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(
                rope.get("scaling.original_context_length", config.max_position_embeddings)
            ),
            "attention_factor": attention * (1.0 + 0.1 * math.log(factor)),
            "beta_fast": float(rope.get("scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(rope.get("scaling.yarn_beta_slow", 1.0)),
        }
    if attention != 1.0 or kind not in ("none", "linear", "yarn"):
        raise ModelError(
            f"base model {file}: its rope.scaling.type is {kind!r} with factor {factor} and attn_factor {attention}; "
            "expected none, linear or yarn, and attn_factor with yarn alone: export the original checkpoint instead"
        )
    if kind == "linear" and factor != 1.0:
        return parameters | {"rope_type": "linear", "factor": factor}
    return parameters


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama3(divisors: npt.NDArray[np.float32], theta: float, rotated: int, file: str) -> dict[str, Any]:
    """Parameters of Llama 3.1's scaling that give these divisors; raises ``ModelError`` if none does."""
    settings = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    expected = _llama3_divisors(theta, rotated, settings["factor"])
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise ModelError(
            f"base model {file}: its tensor rope_freqs.weight divides the rotary frequencies as no Llama 3 model does; "
            "expected the divisors of Llama 3.1 to 3.3: export the original checkpoint instead"
        )
    return settings


def _llama3_divisors(theta: float, rotated: int, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3.1 divides each frequency by: 1 for short waves, ``factor`` for long ones, between them a blend."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    length, low, high = (
        _LLAMA3[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
