"""The adapter in PyTorch float64, from the method's formula; no code is shared with training or runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adalink.export.adapter.error_bound import Float64, adapter_bound
from adalink.runtime.arrays import Array
from adalink.runtime.storage.adapter import TABLE_NAME, Adapter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Exact:
    """Exact outputs of an adapter with shape ``(tokens, d)``, and the error bound of a correct graph."""

    output: Float64
    bound: Float64


def exact_adapter(adapter: Adapter, modality: str, x: Float64, dtype: str, ids: Array | None = None) -> Exact:
    """Adapt ``x`` in float64.

    Args:
        adapter: the weights.
        modality: modality of the inputs. Without weights for it, or without a bottleneck, the output must equal ``x``.
        x: inputs with shape ``(tokens, d)``, exact in ``dtype``.
        dtype: dtype of the task graph's input and output.
        ids: token ids, int64 ``(tokens,)``, for an adapter with a table.
    """
    import torch

    if modality not in adapter.config.modalities or not adapter.config.rank:
        return Exact(x, np.zeros_like(x))
    weights = {
        part: torch.from_numpy(adapter.weights[f"{modality}.{part}"]).double()
        for part in ("down.weight", "up.weight", "down.bias", "up.bias")
        if f"{modality}.{part}" in adapter.weights
    }
    up = weights["up.weight"]
    down_bias, up_bias = weights.get("down.bias"), weights.get("up.bias")
    source = torch.from_numpy(x)
    if adapter.config.input == "ids":
        # A table row is looked up and has no error: its bound is that of an empty inner product.
        down = torch.zeros_like(up.T)
        hidden = torch.nn.functional.embedding(torch.from_numpy(ids), torch.from_numpy(adapter.weights[TABLE_NAME]))
        hidden = hidden.double()
    else:
        down = weights["down.weight"]
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
