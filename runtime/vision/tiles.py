"""Tiles: an image is cut into rows and columns of square tiles, followed by the whole image as one more tile.

The steps are those of transformers' image processors of Idefics3 and SmolVLM (PIL backend).
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import msgspec

from adalink.runtime.storage.vision_schema import Grid

if TYPE_CHECKING:
    from adalink.runtime.arrays import Array

# The processors' limit for the longer edge.
MAX_EDGE = 4096


class Tiling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resizing and tile layout of an image.

    Attributes:
        longest_edge: resize first so that the longer edge has this many pixels; ``None`` skips this.
        edge: height and width of a tile.
        is_cut: whether the image is cut; otherwise it is resized to one tile.
    """

    longest_edge: int | None
    edge: int
    is_cut: bool

    @property
    def most(self) -> int:
        """Most rows, and most columns, of an image; 0 if images are not cut."""
        if not self.is_cut or self.longest_edge is None:
            return 0
        longest = min(self.longest_edge, MAX_EDGE)
        return ceil((longest + longest % 2) / self.edge)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Heights and widths of the successive resizes before the cut."""
        sizes = []
        if self.longest_edge is not None:
            height, width = _below_limit(*_to_longest_edge(height, width, self.longest_edge))
            sizes.append((height, width))
        if not self.is_cut:
            return [*sizes, (self.edge, self.edge)]
        ratio = width / height
        if width >= height:
            width = self._whole(width)
            height = self._whole(int(width / ratio))
        else:
            height = self._whole(height)
            width = self._whole(int(height * ratio))
        return [*sizes, (height, width)]

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of tiles of an image of this size."""
        height, width = self.sizes(height, width)[-1]
        return (0, 0) if height == width == self.edge else (height // self.edge, width // self.edge)

    def cut(self, image: Array, grid: Grid) -> list[Array]:
        """Tiles of a resized image, row by row: views of shape ``(edge, edge, 3)``."""
        rows, columns = ([number * self.edge for number in range(count)] for count in grid)
        return [image[top : top + self.edge, left : left + self.edge] for top in rows for left in columns]

    def _whole(self, length: int) -> int:
        return ceil(length / self.edge) * self.edge


def _to_longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height:
        height = int(longest / ratio)
        return max(height + height % 2, 1), longest
    width = int(longest * ratio)
    return longest, max(width + width % 2, 1)


def _below_limit(height: int, width: int) -> tuple[int, int]:
    ratio = width / height
    if width >= height and width > MAX_EDGE:
        height, width = int(MAX_EDGE / ratio), MAX_EDGE
    elif height > MAX_EDGE:
        height, width = MAX_EDGE, int(MAX_EDGE * ratio)
    return max(height, 1), max(width, 1)
