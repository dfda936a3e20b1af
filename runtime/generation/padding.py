"""Rows of several lengths in one rectangle: padding, positions, and moving tokens to the left."""

from __future__ import annotations

import numpy as np

from adalink.runtime.arrays import Array


def pad_left(prompts: list[list[int]], pad_token_id: int) -> tuple[Array, Array]:
    """Token ids and mask, both int64 of shape ``(batch, longest)``, with the padding before the tokens."""
    longest = max(len(ids) for ids in prompts)
    ids = np.full((len(prompts), longest), pad_token_id, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, tokens in enumerate(prompts):
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    return ids, mask


def positions_of(mask: Array) -> Array:
    """Position of each token among the tokens of its row, int64 of the mask's shape; padding gets 0."""
    positions: Array = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return positions


def positions_after(positions: Array) -> Array:
    """Position of the token after each row, int64 of shape ``(batch, 1)``, or ``(batch, 1, axes)``.

    Args:
        positions: those of the tokens and zeros for padding, shape ``(batch, seq)`` or ``(batch, seq, axes)``.
    """
    after: Array = np.zeros_like(positions[:, :1])
    after += positions.max(axis=tuple(range(1, positions.ndim)), keepdims=True) + 1
    return after


def move_left(embeds: Array, mask: Array) -> tuple[Array, Array]:
    """Each row's tokens at its beginning, in their order.

    Args:
        embeds: shape ``(batch, seq, d)``.
        mask: 1 for tokens, shape ``(batch, seq)``.

    Returns:
        Embeddings with shape ``(batch, longest, d)``, and the rows' lengths, int32 with shape ``(batch,)``.
    """
    lengths = mask.sum(axis=1, dtype=np.int32)
    if mask.all():
        return np.ascontiguousarray(embeds), lengths
    order = np.argsort(mask == 0, axis=1, kind="stable")[:, : lengths.max()]
    return np.take_along_axis(embeds, order[..., None], axis=1), lengths
