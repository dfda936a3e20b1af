"""The parts of the manifest's vision section: how images stand in prompts, and how a vision tower takes them."""

from __future__ import annotations

from math import ceil

import msgspec
import numpy as np

from adalink.runtime.arrays import Array

# Names of a vision graph's input and of its output.
VISION_INPUT, VISION_OUTPUT = "pixel_values", "image_embeds"

# Rows and columns; (0, 0) of an image that is one tile.
Grid = tuple[int, int]

_NONE = -1


class PromptForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt's images, then its text between two others, as transformers' ``PaliGemmaProcessor`` writes it.

    Attributes:
        image: text of the placeholder.
        before: what stands between images and text.
        after: what stands behind the text.
    """

    image: str
    before: str
    after: str

    def format(self, prompt: str, images: int) -> str:
        r"""The whole text, to be tokenized without further special tokens.

        Args:
            prompt: what people write; where it has placeholders, images stand there instead of in front of it, and
                its text begins behind the last.
            images: how many images it has.

        >>> PromptForm(image="<image>", before="<bos>", after="\n").format("caption en", 1)
        '<image><bos>caption en\n'
        """
        last = prompt.rfind(self.image)
        if last < 0:
            return f"{self.image * images}{self.before}{prompt}{self.after}"
        end = last + len(self.image)
        return f"{prompt[:end]}{self.before}{prompt[end:]}{self.after}"


class TileTokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens around the placeholders of an image's tiles, as the model's own processor writes them.

    Attributes:
        before_tile: for each row and each column, those in front of that tile, with what ends the row before.
        before_whole: those in front of the tile that shows the whole image, behind others.
        before_only: those in front of an image's only tile.
        end: those behind an image.
    """

    before_tile: tuple[tuple[tuple[int, ...], ...], ...]
    before_whole: tuple[int, ...]
    before_only: tuple[int, ...]
    end: tuple[int, ...]

    def around(self, placeholders: list[int], grid: Grid) -> list[int]:
        """What an image becomes in a prompt; ``placeholders`` are those of one tile."""
        if grid == (0, 0):
            return [*self.before_only, *placeholders, *self.end]
        rows, columns = grid
        tiles = [
            token for row in self.before_tile[:rows] for before in row[:columns] for token in (*before, *placeholders)
        ]
        return [*tiles, *self.before_whole, *placeholders, *self.end]


def tiles_of(grid: Grid) -> int:
    """How many tiles an image is, the whole one among them."""
    return grid[0] * grid[1] + 1


class PatchTower(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a vision tower looks at the patches of an image.

    Attributes:
        merge: patches on an edge of a piece.
        window: pieces on an edge of the windows that some layers attend within; ``None``: all layers attend to all.
    """

    merge: int
    window: int | None

    def inputs(self, grid: Grid) -> dict[str, Array]:
        """What a vision graph takes beside the patches of one image.

        Args:
            grid: its rows and columns of pieces.

        Returns:
            ``patch_positions``: row and column of each patch, int64 with shape ``(patches, 2)``. With windows also
            ``window_patches``: the patches of each window, int64 with shape ``(windows, places)``, -1 where a window
            reaches beyond the image; and ``patch_places``: where each patch stands among all windows' places, int64
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
