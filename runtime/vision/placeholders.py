"""Image placeholders: one token for each image in the caller's prompt, one for each position in the engine's.

Where images are cut into tiles, further tokens between the positions identify the tiles.

At an image position, an image embedding replaces the placeholder's embedding. The adapter's weights for the modality
``image`` apply there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.storage.digest import cache_key
from adalink.runtime.storage.manifest import Base, Vision
from adalink.runtime.storage.safetensors import as_stored
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import Grid
from adalink.runtime.vision.images import ImageInput

# The images of each row, or None.
Images = Sequence[Sequence[ImageInput] | None] | None


@dataclass(frozen=True, eq=False)
class PreprocessedImage:
    """A preprocessed image: the input of the vision tower.

    Attributes:
        digest: digest of pixel values and grid.
        pixel_values: float32 with shape ``(tiles, 3, height, width)``, or ``(patches, numbers)``.
        grid: rows and columns that it was cut into.
    """

    digest: str
    pixel_values: Array
    grid: Grid


@dataclass(frozen=True, eq=False)
class ImageEmbeds:
    """An encoded image: the output of the vision tower.

    Attributes:
        digest: digest of pixel values and grid.
        embeds: float32 with shape ``(positions, d)``, before any adapter; read-only.
        grid: rows and columns that it was cut into.
    """

    digest: str
    embeds: Array
    grid: Grid = (0, 0)


def check_images(images: Images, rows: int, base: Base) -> list[list[ImageInput]]:
    """The images of each row, as lists; raises ``RequestError``."""
    if images is None:
        return [[] for _ in range(rows)]
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence) or len(images) != rows:
        raise RequestError(
            f"images is {_short(images)} and there are {rows} rows: expected a list with one entry for each row, its "
            "list of images or None"
        )
    by_row = []
    for row, row_images in enumerate(images):
        if row_images is not None and not isinstance(row_images, (list, tuple)):
            raise RequestError(f"images[{row}] is {_short(row_images)}, expected a list of images or None")
        by_row.append(list(row_images or ()))
    if base.vision is None and any(by_row):
        raise RequestError(
            f"{base.name} was exported without a vision tower and takes no images: leave images out, or pass "
            "embeddings of your own to run() with inputs_embeds and modality"
        )
    return by_row


def expand(tokens: list[int], images: Sequence[PreprocessedImage], row: int, base: Base) -> list[int]:
    """Expand each image's placeholder to all its positions, with the tokens around its tiles.

    Args:
        tokens: a prompt with one placeholder for each image, or expanded already.
        images: its images.
        row: its index, for errors.
        base: the contract.

    Raises:
        RequestError: placeholders and images differ in number.
    """
    vision = base.vision
    if vision is None:
        return tokens
    count = tokens.count(vision.image_token_id)
    if count == len(images):
        left = iter(images)
        return [
            token
            for prompt_token in tokens
            for token in (
                vision.image_tokens(next(left).grid) if prompt_token == vision.image_token_id else (prompt_token,)
            )
        ]
    positions = sum(vision.positions(image.grid) for image in images)
    if count != positions:
        raise RequestError(
            f"prompt {row} has {count} placeholders (token {vision.image_token_id}) and {len(images)} images: write "
            f"one placeholder for each image where it belongs, or all {positions} positions that they take up"
        )
    return tokens


def check_expanded(ids: Array, images: Sequence[Sequence[PreprocessedImage]], vision: Vision) -> None:
    """Check that every row of ``(batch, seq)`` has a placeholder for each image position; raises ``RequestError``."""
    for row, row_images in enumerate(images):
        count = int((ids[row] == vision.image_token_id).sum())
        expected = sum(vision.positions(image.grid) for image in row_images)
        if count != expected:
            raise RequestError(
                f"input_ids: row {row} has {count} placeholders (token {vision.image_token_id}) and {len(row_images)} "
                f"images: expected {expected} placeholders, {vision.tokens_per_image} for each image, tile or piece of "
                "one"
            )


def merge(embeds: Array, ids: Array, images: Sequence[Sequence[ImageEmbeds]], base: VisionBase) -> tuple[Array, Array]:
    """Merge image embeddings into a batch's embeddings, before any adapter.

    Args:
        embeds: token embeddings, shape ``(batch, seq, d)``; modified in place.
        ids: token ids with shape ``(batch, seq)``, expanded.
        images: embeddings of each row's images, in order.
        base: the contract.

    Returns:
        Embeddings with shape ``(batch, seq, d)`` in the base's dtype, and the modality of each position, int64 with
        shape ``(batch, seq)``.
    """
    is_image = ids == base.vision.image_token_id
    rows = [image.embeds for row_images in images for image in row_images]
    if rows:
        embeds[is_image] = as_stored(np.concatenate(rows), base.contract.embedding_dtype)
    return embeds, np.where(is_image, base.contract.modalities.index("image"), 0)


def prompt_cache_keys(
    tokens: npt.ArrayLike, images: Sequence[ImageEmbeds], adapter: str, vision: Vision | None
) -> Array:
    """Prefix cache key of each position of a prompt, int64: its token, or its image and the image's adapter.

    Args:
        tokens: the prompt, expanded.
        images: its images.
        adapter: digest of the images' adapter; empty for none.
        vision: the image side of the base.
    """
    keys = np.array(tokens, np.int64)
    if vision is not None and images:
        numbers = np.array([cache_key(f"{image.digest} {adapter}") for image in images], np.int64)
        keys[keys == vision.image_token_id] = np.repeat(numbers, [len(image.embeds) for image in images])
    return keys


def _short(value: object) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
