"""Patches: images that keep their shape are cut into a grid of patches.

The steps are those of transformers' ``Qwen2VLImageProcessor`` (PIL backend). An image is resized to whole pieces. A
piece is ``merge x merge`` patches and becomes one position of the language model. Patches are ordered piece by piece.
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

# The processor's limit of the ratio of the longer to the shorter edge.
_LONGEST = 200


class Patching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resizing and patch layout of images that keep their shape.

    Attributes:
        least_pixels: smaller images are enlarged to at least this many pixels.
        most_pixels: larger images are reduced to at most this many pixels.
        edge: height and width of a patch, in pixels.
        merge: patches on an edge of a piece.
        frames: repetitions of a patch, for a tower that takes several video frames together.
    """

    least_pixels: int
    most_pixels: int
    edge: int
    merge: int
    frames: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; raises ``RequestError`` for an image that is too narrow."""
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
        """Rows and columns of pieces of an image of this size; raises as ``size`` does."""
        height, width = self.size(height, width)
        return height // (self.edge * self.merge), width // (self.edge * self.merge)

    def cut(self, values: Array) -> Array:
        """Cut a resized image into patches.

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
