"""How an adapter's ``down`` starts: what a fresh bottleneck sees of the embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

_TOKENS_AT_ONCE = 8192


@torch.no_grad()
def center_features(down: nn.Linear, embedding: nn.Module, vocab_size: int) -> None:
    """Turn ``down`` away from what all tokens share, and scale it.

    The mean of a base's embeddings can be about as long as what sets a token apart (SmolLM2: 2.2 and 2.3). Then each
    random feature is nearly the same for all tokens, and the first steps of training move all tokens by one vector.
    After this the features of the vocabulary have the mean 0 and, over all of them, the root mean square 1, whatever
    the base. Where all tokens are alike, ``down`` is left as it is.

    Args:
        down: ``d`` to ``r``; its weight with shape ``(r, d)`` is changed in place, its bias is not.
        embedding: the model's embedding module, without an adapter: what it gives for an id is what an adapter sees.
        vocab_size: how many tokens it knows, ``V``.
    """
    weight = down.weight.to(next(embedding.parameters()).device, torch.float64)
    mean = sum((block.sum(0) for block in _embeddings(embedding, vocab_size)), torch.zeros_like(weight[0])) / vocab_size
    direction = nn.functional.normalize(mean, dim=0)
    weight = weight - torch.outer(weight @ direction, direction)
    square = sum(float((block @ weight.T).square().sum()) for block in _embeddings(embedding, vocab_size))
    size = (square / (vocab_size * len(weight))) ** 0.5
    if size > 1e-6 * float(mean.norm()):
        down.weight.copy_(weight / size)


def _embeddings(embedding: nn.Module, vocab_size: int) -> Iterator[torch.Tensor]:
    """float64 with shape ``(up to _TOKENS_AT_ONCE, d)``, all tokens in turn."""
    device = next(embedding.parameters()).device
    for start in range(0, vocab_size, _TOKENS_AT_ONCE):
        yield embedding(torch.arange(start, min(start + _TOKENS_AT_ONCE, vocab_size), device=device)).double()
