"""Pictures that keep their shape: the grid of patches that one becomes, and how a vision tower looks at such a grid.

The steps are those of transformers' ``Qwen2VLImageProcessor`` (its PIL backend). A picture is resized to whole pieces;
a piece, ``merge x merge`` patches, becomes one position of the language model. Patches stand piece by piece.
"""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from adalink.runtime.errors import RequestError
from adalink.runtime.vision.tiles import Grid

if TYPE_CHECKING:
    from adalink.runtime.engine import Array

# The processor's own limit of the longer edge over the shorter.
_LONGEST = 200
_NONE = -1


class Patching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a picture is cut.

    Attributes:
        least_pixels: a smaller picture is enlarged to have at least this many pixels.
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
        """Height and width that a picture is resized to; raises ``RequestError`` for one that is too narrow."""
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
        """Rows and columns of pieces that a picture of this size becomes; raises as ``size`` does."""
        height, width = self.size(height, width)
        return height // (self.edge * self.merge), width // (self.edge * self.merge)

    def cut(self, values: Array) -> Array:
        """The patches of a picture that has been resized.

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


class PatchTower(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a vision tower looks at the patches of a picture.

    Attributes:
        merge: patches on an edge of a piece.
        window: pieces on an edge of the windows that some layers attend within; ``None``: all layers attend to all.
    """

    merge: int
    window: int | None

    def inputs(self, grid: Grid) -> dict[str, Array]:
        """What a vision graph takes beside the patches of one picture.

        Args:
            grid: its rows and columns of pieces.

        Returns:
            ``patch_positions``: row and column of each patch, int64 with shape ``(patches, 2)``. With windows also
            ``window_patches``: the patches of each window, int64 with shape ``(windows, places)``, -1 where a window
            reaches beyond the picture; and ``patch_places``: where each patch stands among all windows' places, int64
            with shape ``(patches,)``.
        """
        rows, columns = grid
        merge = self.merge
        cells = np.indices((rows * merge, columns * merge)).reshape(2, rows, merge, columns, merge)
        positions = np.ascontiguousarray(cells.transpose(1, 3, 2, 4, 0).reshape(-1, 2))
        if self.window is None:
            return {"patch_positions": positions}
        windows = self._windows(grid, self.window)
        flat = windows.ravel()
        places = np.empty(len(positions), np.int64)
        places[flat[flat != _NONE]] = np.flatnonzero(flat != _NONE)
        return {"patch_positions": positions, "window_patches": windows, "patch_places": places}

    def _windows(self, grid: Grid, window: int) -> Array:
        rows, columns = grid
        high, wide = ceil(rows / window), ceil(columns / window)
        pieces = np.full((high * window, wide * window), _NONE)
        pieces[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        by_window = pieces.reshape(high, window, wide, window).transpose(0, 2, 1, 3).reshape(high * wide, -1, 1)
        count = self.merge**2
        return np.where(by_window == _NONE, _NONE, by_window * count + np.arange(count)).reshape(high * wide, -1)
