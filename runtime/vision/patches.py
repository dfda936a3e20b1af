"""Images that keep their shape: the grid of patches that one becomes, and how a vision tower looks at such a grid.

The steps are those of transformers' ``Qwen2VLImageProcessor`` (its PIL backend). An image is resized to whole pieces;
a piece, ``merge x merge`` patches, becomes one position of the language model. Patches stand piece by piece.
"""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from adalink.runtime.errors import RequestError
from adalink.runtime.storage.vision_schema import Grid

if TYPE_CHECKING:
    from adalink.runtime.arrays import Array

# The processor's own limit of the longer edge over the shorter.
_LONGEST = 200


class Patching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an image is cut.

    Attributes:
        least_pixels: a smaller image is enlarged to have at least this many pixels.
        most_pixels: a larger one is reduced to at most this many.
        edge: height and width of a patch, in pixels.
        merge: patches on an edge of a piece.
        frames: how often a patch is repeated, for a tower that takes moments of a video together.
    """

    least_pixels: int
    most_pixels: int
    edge: int
    merge: int
    frames: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to; raises ``RequestError`` for one that is too narrow."""
        if max(height, width) > _LONGEST * min(height, width):
            raise RequestError(
                f"the image is {width} x {height} pixels, expected the longer edge to be at most {_LONGEST} times the "
                "shorter: crop it first"
            )
        piece = self.edge * self.merge
        rows, columns = round(height / piece), round(width / piece)
        if rows * columns * piece**2 > self.most_pixels:
            factor = sqrt(height * width / self.most_pixels)
            rows, columns = (max(1, floor(length / factor / piece)) for length in (height, width))
        elif rows * columns * piece**2 < self.least_pixels:
            factor = sqrt(self.least_pixels / (height * width))
            rows, columns = (ceil(length * factor / piece) for length in (height, width))
        return rows * piece, columns * piece

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of pieces that an image of this size becomes; raises as ``size`` does."""
        height, width = self.size(height, width)
        return height // (self.edge * self.merge), width // (self.edge * self.merge)

    def cut(self, values: Array) -> Array:
        """The patches of an image that has been resized.

        Args:
            values: float32 with shape ``(3, height, width)``.

        Returns:
            float32 with shape ``(patches, 3 * frames * edge * edge)``.
        """
        edge, merge = self.edge, self.merge
        rows, columns = (length // (edge * merge) for length in values.shape[1:])
        cells = values.reshape(3, rows, merge, edge, columns, merge, edge).transpose(1, 4, 2, 5, 0, 3, 6)
        count = rows * columns * merge * merge
        frames = np.repeat(cells.reshape(count, 3, 1, edge, edge), self.frames, axis=2)
        return frames.reshape(count, -1)
