"""Vision section of the manifest: prompt format, tile tokens and patch layout."""

from __future__ import annotations

from math import ceil

import msgspec
import numpy as np

from adalink.runtime.arrays import Array

# Input and output name of a vision graph.
VISION_INPUT, VISION_OUTPUT = "pixel_values", "image_embeds"

# Rows and columns; (0, 0) for an image of one tile.
Grid = tuple[int, int]

_NONE = -1


class PromptForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prompt format of transformers' ``PaliGemmaProcessor``: images, then the text between a prefix and a suffix.

    Attributes:
        image: text of the placeholder.
        before: prefix of the text, after the images.
        after: suffix of the text.
    """

    image: str
    before: str
    after: str

    def format(self, prompt: str, images: int) -> str:
        r"""The formatted prompt, to be tokenized without further special tokens.

        Args:
            prompt: the caller's prompt. Placeholders in it stay where they are, and its text begins after the last one;
                without any, placeholders are prepended.
            images: its number of images.

        >>> PromptForm(image="<image>", before="<bos>", after="\n").format("caption en", 1)
        '<image><bos>caption en\n'
        """
        last = prompt.rfind(self.image)
        if last < 0:
            return f"{self.image * images}{self.before}{prompt}{self.after}"
        end = last + len(self.image)
        return f"{prompt[:end]}{self.before}{prompt[end:]}{self.after}"


class TileTokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens around the placeholders of an image's tiles, as in the model's processor.

    Attributes:
        before_tile: tokens before the tile at each row and column, including the end of the previous row.
        before_whole: tokens before the tile of the whole image, which follows the others.
        before_only: tokens before a single tile.
        end: tokens after an image.
    """

    before_tile: tuple[tuple[tuple[int, ...], ...], ...]
    before_whole: tuple[int, ...]
    before_only: tuple[int, ...]
    end: tuple[int, ...]

    def around(self, placeholders: list[int], grid: Grid) -> list[int]:
        """All tokens of an image in a prompt; ``placeholders`` are those of one tile."""
        if grid == (0, 0):
            return [*self.before_only, *placeholders, *self.end]
        rows, columns = grid
        tiles = [
            token for row in self.before_tile[:rows] for before in row[:columns] for token in (*before, *placeholders)
        ]
        return [*tiles, *self.before_whole, *placeholders, *self.end]


def tiles_of(grid: Grid) -> int:
    """Number of tiles of an image, the whole image included."""
    return grid[0] * grid[1] + 1


class PatchTower(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Patch layout of a vision tower.

    Attributes:
        merge: patches on an edge of a piece.
        window: pieces on an edge of an attention window, for towers with windowed layers; ``None`` without windows.
    """

    merge: int
    window: int | None

    def inputs(self, grid: Grid) -> dict[str, Array]:
        """Inputs of a vision graph beside the patches of one image.

        Args:
            grid: its rows and columns of pieces.

        Returns:
            ``patch_positions``: row and column of each patch, int64 with shape ``(patches, 2)``. With windows also
            ``window_patches``: the patches of each window, int64 with shape ``(windows, slots)``, -1 where a window
            extends beyond the image; and ``patch_places``: the slot of each patch among all windows' slots, int64
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
        window_slots = np.empty(len(positions), np.int64)
        window_slots[flat[flat != _NONE]] = np.flatnonzero(flat != _NONE)
        return {"patch_positions": positions, "window_patches": windows, "patch_places": window_slots}

    def _windows(self, grid: Grid, window: int) -> Array:
        rows, columns = grid
        high, wide = ceil(rows / window), ceil(columns / window)
        pieces = np.full((high * window, wide * window), _NONE)
        pieces[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        by_window = pieces.reshape(high, window, wide, window).transpose(0, 2, 1, 3).reshape(high * wide, -1, 1)
        count = self.merge**2
        return np.where(by_window == _NONE, _NONE, by_window * count + np.arange(count)).reshape(high * wide, -1)
