"""Image preprocessing: pixels to the vision tower's input, by the steps of the model's image processor, in numpy.

It follows transformers' processors (PIL backend) step by step; Pillow does the resizing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil, prod
from typing import Any

import msgspec
import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.vision_schema import Grid
from adalink.runtime.vision.patches import Patching
from adalink.runtime.vision.tiles import Tiling

# Pillow's limit for decompression bombs; also the limit after the shorter edge is enlarged.
MAX_PIXELS = 89_478_485
_MAX_EDGE = 1 << 14
_MAX_PATCH = 1 << 10
_FILTERS = 6  # Pillow's resampling filters are numbered from 0


class Preprocessor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``preprocessor.json``: the steps applied to an RGB image, in this order; ``None`` skips a step.

    Attributes:
        pad_color: pad to a square of this RGB colour, the image in the middle.
        shortest_edge: resize so that the shorter edge has this many pixels; or else
        resize: resize to this height and width, ignoring the aspect ratio.
        resample: Pillow's number of the resampling filter.
        crop: centre crop to this height and width, padded with zeros.
        rescale_factor: multiply the values 0 to 255 by this.
        mean: subtract this from each channel.
        std: then divide each channel by this.
        tiling: resize and cut into tiles, instead of the steps before ``rescale_factor``.
        patching: resize instead of the steps before ``rescale_factor``, and cut into patches at the end.
    """

    pad_color: tuple[int, int, int] | None
    shortest_edge: int | None
    resize: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    tiling: Tiling | None = None
    patching: Patching | None = None

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of an image that is neither cut into tiles nor into patches; ``None`` if they vary."""
        edge = self.shortest_edge
        return self.crop or self.resize or ((edge, edge) if self.pad_color is not None and edge else None)

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of tiles or pieces of an image of this size; ``(0, 0)`` for a single tile."""
        if self.patching is not None:
            return self.patching.grid(height, width)
        return (0, 0) if self.tiling is None else self.tiling.grid(height, width)

    def apply(self, image: Array) -> Array:
        """Pixel values of one image.

        Args:
            image: RGB, uint8 with shape ``(height, width, 3)``.

        Returns:
            float32 with shape ``(tiles, 3, height, width)``, one tile unless images are cut into tiles; or
            ``(patches, numbers)`` for images cut into patches.

        Raises:
            RequestError: the image is too narrow for the model's processor, or resizing or padding it would exceed
                ``MAX_PIXELS``.
        """
        tiles = [self._one(image)] if self.tiling is None else self._tiles(image, self.tiling)
        tables = self._tables()
        values: Array = np.empty((len(tiles), *tiles[0].shape), np.float32)
        for tile, tile_values in zip(tiles, values, strict=True):
            for table, levels, result in zip(tables, tile, tile_values, strict=True):
                np.take(table, levels, out=result, mode="clip")
        return values if self.patching is None else self.patching.cut(values[0])

    def _tables(self) -> Array:
        """Lookup tables of the values 0 to 255 for each channel: float32 with shape ``(3, 256)``."""
        levels: Array = np.arange(256)
        if self.rescale_factor is not None:
            levels = levels.astype(np.float64) * self.rescale_factor
        tables = np.tile(levels.astype(np.float32), (3, 1))
        if self.mean is not None:
            mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (self.mean, self.std))
            tables = (tables - mean) / std
        return tables

    def _one(self, image: Array) -> Array:
        """The image as a single tile: uint8 with shape ``(3, height, width)``."""
        image = image if self.pad_color is None else _padded_to_square(image, self.pad_color)
        if size := self._target(image.shape[0], image.shape[1]):
            image = _resized(image, size, self.resample)
        values = image.transpose(2, 0, 1)
        return values if self.crop is None else _cropped(values, *self.crop)

    def _tiles(self, image: Array, tiling: Tiling) -> list[Array]:
        """The tiles of an image, then the whole image as one tile: uint8, each of shape ``(3, edge, edge)``."""
        height, width, _ = image.shape
        for size in tiling.sizes(height, width):
            image = _resized(image, size, self.resample)
        whole = _resized(image, (tiling.edge, tiling.edge), self.resample)
        return [tile.transpose(2, 0, 1) for tile in (*tiling.cut(image, tiling.grid(height, width)), whole)]

    def _target(self, height: int, width: int) -> tuple[int, int] | None:
        if self.patching is not None:
            return self.patching.size(height, width)
        if self.shortest_edge is None:
            return self.resize
        longest = int(self.shortest_edge * max(height, width) / min(height, width))
        if longest * self.shortest_edge > MAX_PIXELS:
            raise RequestError(
                f"the image is {width} x {height} pixels: with its shorter edge resized to {self.shortest_edge} it "
                f"would have more than {MAX_PIXELS} pixels; crop it first"
            )
        return (longest, self.shortest_edge) if width <= height else (self.shortest_edge, longest)


def read_preprocessor(data: bytes, origin: str) -> Preprocessor:
    """Decode ``preprocessor.json``; raises ``IntegrityError``, with the field whose value makes no sense."""
    try:
        steps = decode_json(data, Preprocessor)
    except msgspec.DecodeError as error:
        raise IntegrityError(f"{origin} is not a preprocessor: {error}; export the base again") from error
    for field, value, expected, holds in _rules(steps):
        if value is not None and not holds(value):
            raise IntegrityError(f"{origin}: {field} is {value}, expected {expected}: export the base again")
    if (steps.mean is None) != (steps.std is None):
        raise IntegrityError(f"{origin}: mean is {steps.mean} and std is {steps.std}, expected both or neither")
    return steps


_Rule = tuple[str, Any, str, Callable[[Any], bool]]


def _rules(steps: Preprocessor) -> Iterator[_Rule]:
    """Fields with their values, what is expected of them, and whether it holds."""

    def is_size(value: int) -> bool:
        return 1 <= value <= _MAX_EDGE

    def are_sizes(values: Sequence[int]) -> bool:
        return all(map(is_size, values)) and prod(values) <= MAX_PIXELS

    sizes, size = f"1 to {_MAX_EDGE} each and at most {MAX_PIXELS} pixels", f"1 to {_MAX_EDGE}"
    yield "pad_color", steps.pad_color, "0 to 255 each", lambda color: all(0 <= value <= 255 for value in color)
    yield "shortest_edge", steps.shortest_edge, size, is_size
    yield "resize", steps.resize, sizes, are_sizes
    yield "resample", steps.resample, f"0 to {_FILTERS - 1}", lambda number: 0 <= number < _FILTERS
    yield "crop", steps.crop, sizes, are_sizes
    yield "rescale_factor", steps.rescale_factor, "a number above 0, at most 1e6", lambda factor: 0 < factor <= 1e6
    yield "mean", steps.mean, "numbers of at most 1e6", lambda mean: all(abs(value) <= 1e6 for value in mean)
    yield "std", steps.std, "numbers of 1e-6 to 1e6", lambda std: all(1e-6 <= value <= 1e6 for value in std)
    if steps.tiling is not None:
        yield "tiling.longest_edge", steps.tiling.longest_edge, size, is_size
        yield "tiling.edge", steps.tiling.edge, size, is_size
    if (cut := steps.patching) is not None:
        yield "patching.most_pixels", cut.most_pixels, f"1 to {MAX_PIXELS}", lambda most: 1 <= most <= MAX_PIXELS
        yield "patching.least_pixels", cut.least_pixels, "0 to most_pixels", lambda least: 0 <= least <= cut.most_pixels
        for name in ("edge", "merge", "frames"):
            yield f"patching.{name}", getattr(cut, name), f"1 to {_MAX_PATCH}", lambda value: 1 <= value <= _MAX_PATCH
        piece = (cut.edge * cut.merge) ** 2
        yield "patching.edge", cut.edge, "a piece of at most most_pixels", lambda edge: piece <= cut.most_pixels


def _padded_to_square(image: Array, color: tuple[int, int, int]) -> Array:
    height, width, _ = image.shape
    side = max(height, width)
    if side * side > MAX_PIXELS:
        raise RequestError(
            f"the image is {width} x {height} pixels: filled up to a square it would have more than {MAX_PIXELS} "
            "pixels; crop it, or make it smaller first"
        )
    square = np.empty((side, side, 3), np.uint8)
    square[:] = color
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def _resized(image: Array, size: tuple[int, int], resample: int) -> Array:
    from PIL import Image

    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(resample)))


def _cropped(values: Array, height: int, width: int) -> Array:
    """Centre crop of ``(3, h, w)``, padded with zeros where it is smaller."""
    image_height, image_width = values.shape[1:]
    if image_height < height or image_width < width:
        large = np.zeros((3, max(height, image_height), max(width, image_width)), values.dtype)
        top, left = ceil((large.shape[1] - image_height) / 2), ceil((large.shape[2] - image_width) / 2)
        large[:, top : top + image_height, left : left + image_width] = values
        # The crop's origin is rounded relative to the image, not to the padded frame.
        top, left = (image_height - height) // 2 + top, (image_width - width) // 2 + left
        values = large
    else:
        top, left = (image_height - height) // 2, (image_width - width) // 2
    return values[:, top : top + height, left : left + width]
