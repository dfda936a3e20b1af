"""Images of training rows: read as the runtime reads them, prepared by the model's own image processor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adalink.runtime.digest import digest_file
from adalink.runtime.errors import DataError, ModelError, RequestError
from adalink.runtime.pictures import read_picture
from adalink.training.dataset import Example, ImageTokens
from adalink.training.vision import image_side

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pictures:
    """What turns the images of examples into a base's ``pixel_values``.

    Attributes:
        tokens: how the base wants images in a prompt.
    """

    def __init__(self, base: str | Path, model: PreTrainedModel) -> None:
        """Load the image processor that lies beside a checkpoint.

        Args:
            base: the checkpoint.
            model: the same, loaded; LLaVA-like.

        Raises:
            ModelError: there is no image processor, or the model takes no images that way.
        """
        from transformers import AutoImageProcessor

        side = image_side(model)
        if side is None:
            raise ModelError(
                f"{type(model).__name__} takes no images in a way that is supported: remove them from the rows"
            )
        try:
            self._processor = AutoImageProcessor.from_pretrained(str(base), backend="pil", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{base}: no image processor was found, expected preprocessor_config.json beside it ({error})"
            ) from error
        self.tokens = ImageTokens(side.image_token_id, self._positions(model))

    def inputs(self, examples: Sequence[Example], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """``pixel_values`` of all images of a batch in the order of its rows; nothing if it has none.

        Returns:
            float32 with shape ``(images, 3, height, width)``.

        Raises:
            DataError: a file is no image.
        """
        pictures = []
        for path in (path for example in examples for path in example.images):
            try:
                pictures.append(read_picture(path, "image"))
            except RequestError as error:
                raise DataError(str(error)) from error
        if not pictures:
            return {}
        values = self._processor(images=pictures, input_data_format="channels_last", return_tensors="pt")
        return {"pixel_values": values["pixel_values"].to(device)}

    def _positions(self, model: PreTrainedModel) -> int:
        """How many positions an image takes up: what the projector gives for one."""
        import numpy as np

        grey = np.full((64, 64, 3), 127, np.uint8)
        values = self._processor(images=[grey], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = model.base_model.get_image_features(pixel_values=values.to(model.device))
        features = getattr(found, "pooler_output", found)
        return int(features[0].shape[-2])


def digest_images(examples: Sequence[Example]) -> str:
    """Digest of the images of all examples, in their order."""
    state = hashlib.sha256()
    for path in (path for example in examples for path in example.images):
        state.update(digest_file(path).encode("ascii"))
    return f"sha256:{state.hexdigest()}"
