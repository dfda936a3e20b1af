"""Constants that older checkpoints hold as tensors, and that models compute: masks, positions, rotary frequencies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_MASK = re.compile(r"(^|\.)(attn|crossattention|attention)\.bias$")


def find_constant(name: str, read: Callable[[str], torch.Tensor], model: PreTrainedModel) -> bool | None:
    """Whether a tensor is a constant with the values that the model computes.

    Args:
        name: name of a tensor that the model has no place for.
        read: callback that gives its values.
        model: the model.

    Returns:
        ``None`` if the name is none of a constant, else whether the values are the expected ones.
    """
    import torch

    last = name.rpartition(".")[2]
    if last in ("position_ids", "token_type_ids"):
        values = read(name).to(torch.int64).flatten()
        expected = torch.arange(len(values)) if last == "position_ids" else torch.zeros_like(values)
        return torch.equal(values, expected)
    if last == "masked_bias":
        values = read(name)
        return values.numel() == 1 and float(values) <= -1e4
    if last == "inv_freq":
        return _is_same_rope(read(name), model)
    if _MASK.search(name) and (values := read(name)).dim() == 4:
        return torch.equal(values.bool(), torch.ones_like(values, dtype=torch.bool).tril())
    return None


def _is_same_rope(stored: torch.Tensor, model: PreTrainedModel) -> bool:
    """Whether rotary frequencies are those of a module of the model, up to the rounding of their dtype."""
    import torch

    tolerance = 4 * torch.finfo(stored.dtype).eps if stored.is_floating_point() else 0.0
    computed = [
        buffer.double() for name, buffer in model.named_buffers() if "inv_freq" in name and buffer.shape == stored.shape
    ]
    return any(torch.allclose(stored.double(), values, rtol=tolerance, atol=1e-7) for values in computed)
