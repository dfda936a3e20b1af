"""The adapter in PyTorch float64, written from the method's formula and sharing no code with training or runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adalink.export.bounds import Float64, adapter_bound
from adalink.runtime.adapter import Adapter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Exact:
    """Exact outputs of an adapter with shape ``(tokens, d)``, and how far a correct graph may lie from them."""

    output: Float64
    bound: Float64


def exact_adapter(adapter: Adapter, modality: str, x: Float64, dtype: str) -> Exact:
    """Adapt ``x`` in float64.

    Args:
        adapter: the weights.
        modality: whose weights; one that the adapter does not have leaves ``x`` as it is, and demands equality.
        x: inputs with shape ``(tokens, d)``, exact in ``dtype``.
        dtype: dtype of the task graph's input and output.
    """
    import torch

    if modality not in adapter.config.modalities:
        return Exact(x, np.zeros_like(x))
    weights = {
        part: torch.from_numpy(adapter.weights[f"{modality}.{part}"]).double()
        for part in ("down.weight", "up.weight", "down.bias", "up.bias")
        if f"{modality}.{part}" in adapter.weights
    }
    down, up = weights["down.weight"], weights["up.weight"]
    down_bias, up_bias = weights.get("down.bias"), weights.get("up.bias")
    source = torch.from_numpy(x)
    hidden = torch.nn.functional.linear(source, down, down_bias)
    activated = _activation(adapter.config.activation)(hidden)
    output = source + torch.nn.functional.linear(activated, up, up_bias)
    bound = adapter_bound(
        x,
        down.numpy(),
        up.numpy(),
        None if down_bias is None else down_bias.numpy(),
        None if up_bias is None else up_bias.numpy(),
        hidden.numpy(),
        activated.numpy(),
        activation=adapter.config.activation,
        dtype=dtype,
    )
    return Exact(output.numpy(), bound)


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch
    from torch.nn import functional

    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "identity": lambda value: value,
        "relu": torch.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
        "silu": functional.silu,
        "tanh": torch.tanh,
    }
    return known[name]
