"""AdaLink (arXiv 2310.12100): a low-rank residual bottleneck on embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class AdaLink(nn.Module):
    """``x + up(act(down(x)))`` on embeddings of one modality.

    ``down`` starts Kaiming-uniform and ``up`` zero, so a new adapter is the identity. The arithmetic is float32 for any
    dtype of ``x``, also under autocast.

    Args:
        hidden_size: width ``d`` of the embeddings.
        rank: width ``r`` of the bottleneck.
        activation: one of ``adalink.runtime.storage.adapter.ACTIVATIONS``.
        bias: whether ``down`` and ``up`` carry a bias.
        dropout: dropout probability of bottleneck features in training.
    """

    def __init__(
        self, hidden_size: int, rank: int, activation: str = "gelu", bias: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=bias, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=bias, dtype=torch.float32)
        self.activation = activation
        self.dropout = dropout
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        for bias_vector in (self.down.bias, self.up.bias):
            if bias_vector is not None:
                nn.init.zeros_(bias_vector)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adapt embeddings.

        Args:
            x: embeddings with shape ``(..., d)``, any floating dtype.

        Returns:
            adapted embeddings with the shape and dtype of ``x``.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            narrow = _ACTIVATIONS[self.activation](self.down(wide))
            change: torch.Tensor = self.up(functional.dropout(narrow, self.dropout, self.training))
            return (wide + change).to(x.dtype)
