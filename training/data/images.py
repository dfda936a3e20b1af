"""Images of training rows: read as in the runtime, preprocessed by the model's own image processor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from adalink.runtime.arrays import Array
from adalink.runtime.errors import DataError, ModelError, RequestError
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.vision.images import read_image
from adalink.training.data.rows import Example, ImageTokens
from adalink.training.models.patches import read_patching
from adalink.training.models.tiles import read_tile_tokens, read_tiling
from adalink.training.models.vision import ImageSide, find_image_processor, image_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainingImages:
    """Image inputs of a base: ``pixel_values`` of examples, and placeholders in their prompts.

    Attributes:
        tokens: placeholders of images in a prompt.
    """

    def __init__(self, base: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load the image processor of a checkpoint.

        Args:
            base: the checkpoint.
            model: the same, loaded.
            tokenizer: its tokenizer, with the tokens around tiles.

        Raises:
            ModelError: there is no image processor, or the model takes images in no supported way.
        """
        side = image_side(model)
        if side is None:
            raise ModelError(
                f"{type(model).__name__} takes no images in a way that is supported: remove them from the rows"
            )
        processor = find_image_processor(base)
        if processor is None:
            raise ModelError(f"{base}: no image processor was found, expected preprocessor_config.json beside it")
        self._processor = processor
        self._takes_tiles, self._takes_patches = side.takes_tiles, side.takes_patches
        self.tokens = ImageTokens(side.image_token_id, self._make_image_tokens(model, side, tokenizer))

    def join(self, batch: dict[str, torch.Tensor], examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Add the images of a batch, in the order of its rows; a batch without images is unchanged.

        Args:
            batch: ``input_ids`` with shape ``(batch, seq)`` and the other inputs.
            examples: its rows.

        Returns:
            The batch with ``pixel_values``, float32 with shape ``(images, 3, height, width)``. For a base that takes
            tiles the shape is ``(1, tiles, 3, height, width)``, as if of one row, so that no row is padded with empty
            tiles. For one that takes patches it is ``(patches, numbers)``, with ``image_grid_thw`` of shape
            ``(images, 3)`` and ``mm_token_type_ids`` of shape ``(batch, seq)``, for the model's position ids, in
            place of ``position_ids``.

        Raises:
            DataError: a file is no image.
        """
        images = [_read(path) for example in examples for path in example.images]
        if not images:
            return batch
        ids = batch["input_ids"]
        prepared = self._prepare(images)
        joined = batch | {"pixel_values": prepared["pixel_values"].to(ids.device)}
        if self._takes_patches:
            joined.pop("position_ids", None)
            joined["image_grid_thw"] = prepared["image_grid_thw"].to(ids.device)
            joined["mm_token_type_ids"] = (ids == self.tokens.token_id).int()
        return joined

    def _prepare(self, images: list[Array]) -> dict[str, torch.Tensor]:
        return dict(self._processor(images=images, input_data_format="channels_last", return_tensors="pt"))

    def _make_image_tokens(
        self, model: PreTrainedModel, side: ImageSide, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[Path], list[int]]:
        """A function from an image file to its tokens in a prompt."""
        if side.takes_patches:
            patching = read_patching(self._processor)

            def pieces(path: Path) -> list[int]:
                height, width, _ = _read(path).shape
                try:
                    rows, columns = patching.grid(height, width)
                except RequestError as error:
                    raise DataError(f"{path}: {error}") from error
                return [side.image_token_id] * (rows * columns)

            return pieces
        placeholders = [side.image_token_id] * self._positions(model)
        if not side.takes_tiles:
            return lambda path: placeholders
        tiling = read_tiling(self._processor)
        around = read_tile_tokens(tokenizer, tiling, side.image_token_id, len(placeholders)).around

        def tiles(path: Path) -> list[int]:
            height, width, _ = _read(path).shape
            return around(placeholders, tiling.grid(height, width))

        return tiles

    def _positions(self, model: PreTrainedModel) -> int:
        """Positions of an image or tile: the rows of the projector's output."""
        pixels = self._prepare([np.full((64, 64, 3), 127, np.uint8)])["pixel_values"]
        if self._takes_tiles:
            pixels = pixels[:, :1]
        with torch.no_grad():
            output = model.base_model.get_image_features(pixel_values=pixels.to(model.device))
        features = getattr(output, "pooler_output", output)
        return int(features[0].shape[-2])


def _read(path: Path) -> Array:
    """Pixels of an image file; raises ``DataError``."""
    try:
        return read_image(path, "image")
    except RequestError as error:
        raise DataError(str(error)) from error


def digest_images(examples: Sequence[Example]) -> str:
    """Digest of the images of all examples, in their order."""
    state = hashlib.sha256()
    for path in (path for example in examples for path in example.images):
        state.update(digest_file(path).encode("ascii"))
    return f"sha256:{state.hexdigest()}"
