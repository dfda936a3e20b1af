"""M-RoPE position ids: time, row and column of each position (Qwen2-VL, arXiv 2409.12191).

A text token has the same number on all three axes. An image continues from the text before it: one time, and its rows
and columns counted from there. The next token continues after the larger of the two (``get_rope_index`` of
transformers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.storage.vision_schema import Grid

AXES = 3


def grid_positions(ids: Array | None, mask: Array, grids: Sequence[Sequence[Grid]], image_token_id: int) -> Array:
    """Position ids of a batch.

    Args:
        ids: token ids, shape ``(batch, seq)``; required if there are images.
        mask: 1 for tokens, shape ``(batch, seq)``.
        grids: rows and columns of the images of each row; none for a batch of text.
        image_token_id: the placeholder token of image positions.

    Returns:
        int64 with shape ``(batch, seq, 3)``; padding gets 0.

    Raises:
        RequestError: an image's placeholders are missing or not contiguous.
    """
    positions = np.zeros((*mask.shape, AXES), np.int64)
    for row in range(len(mask)):
        columns = np.flatnonzero(mask[row])
        row_grids = grids[row] if grids else ()
        tokens = ids[row, columns] if ids is not None else columns
        positions[row, columns] = _row_positions(tokens == image_token_id, row_grids, row)
    return positions


def _row_positions(is_image: Array, grids: Sequence[Grid], row: int) -> Array:
    """Position ids of one row's tokens, int64 with shape ``(tokens, 3)``."""
    positions = np.empty((len(is_image), AXES), np.int64)
    done = following = 0
    for number, (rows, columns) in enumerate(grids):
        first = done + (int(is_image[done:].argmax()) if done < len(is_image) else 0)
        end = first + rows * columns
        if end > len(is_image) or not is_image[first:end].all():
            raise RequestError(
                f"row {row}: the placeholders of image {number} do not stand together, expected {rows * columns} in a "
                "row: write one placeholder, which becomes all of them, and leave none of them out by attention_mask"
            )
        positions[done:first] = (following + np.arange(first - done))[:, None]
        following += first - done
        positions[first:end, 0] = following
        positions[first:end, 1:] = following + np.indices((rows, columns)).reshape(2, -1).T
        done, following = end, following + max(rows, columns)
    positions[done:] = (following + np.arange(len(is_image) - done))[:, None]
    return positions
