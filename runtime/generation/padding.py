"""Padding: prompts of different lengths in one array, their position ids, and removal of padding."""

from __future__ import annotations

import numpy as np

from adalink.runtime.arrays import Array


def pad(prompts: list[list[int]], pad_token_id: int, side: str) -> tuple[Array, Array]:
    """Token ids and mask, both int64 of shape ``(batch, longest)``.

    Args:
        prompts: token ids of each, at least one.
        pad_token_id: the padding token.
        side: ``"left"`` for padding before the tokens, ``"right"`` for padding after them.
    """
    longest = max(len(ids) for ids in prompts)
    ids = np.full((len(prompts), longest), pad_token_id, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, tokens in enumerate(prompts):
        columns = slice(longest - len(tokens), longest) if side == "left" else slice(len(tokens))
        ids[row, columns] = tokens
        mask[row, columns] = 1
    return ids, mask


def positions_of(mask: Array) -> Array:
    """Position of each token among the tokens of its row, int64 of the mask's shape; padding gets 0."""
    positions: Array = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return positions


def positions_after(positions: Array) -> Array:
    """Position of the token after each row, int64 of shape ``(batch, 1)``, or ``(batch, 1, axes)``.

    Args:
        positions: position ids, 0 at padding, shape ``(batch, seq)`` or ``(batch, seq, axes)``.
    """
    after: Array = np.zeros_like(positions[:, :1])
    after += positions.max(axis=tuple(range(1, positions.ndim)), keepdims=True) + 1
    return after


def move_left(embeds: Array, mask: Array) -> tuple[Array, Array]:
    """Move each row's tokens to its beginning, in order.

    Args:
        embeds: shape ``(batch, seq, d)``.
        mask: 1 for tokens, shape ``(batch, seq)``.

    Returns:
        Embeddings with shape ``(batch, longest, d)``, and row lengths, int32 with shape ``(batch,)``.
    """
    lengths = mask.sum(axis=1, dtype=np.int32)
    longest = lengths.max()
    if mask[:, :longest].sum() == lengths.sum() and (mask[:, :-1] >= mask[:, 1:]).all():
        return np.ascontiguousarray(embeds[:, :longest]), lengths
    order = np.argsort(mask == 0, axis=1, kind="stable")[:, :longest]
    return np.take_along_axis(embeds, order[..., None], axis=1), lengths
