"""Images as the reference takes them, and the features that it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Images by the names of a model's inputs: float32 `pixel_values` in the shape that it takes, and what goes with them.
Pixels = Mapping[str, "npt.NDArray[Any]"]


def image_features(model: Any, images: dict[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """Image features, one tensor for each image; for tiles one for each row, whatever the version of transformers."""
    features: Any = model.get_image_features(**images).pooler_output
    values = images["pixel_values"]
    if values.ndim == 5 and len(features) != len(values):  # until 5.20 a tensor for each tile, without tiles of zeros
        counts = (values != 0).flatten(2).any(dim=2).sum(dim=1).tolist()
        features = features.split(counts)
    return list(features)


def pixel_tensors(model: Any, pixels: Pixels) -> dict[str, torch.Tensor]:
    """Images as tensors, ``pixel_values`` in the model's dtype."""
    import torch

    tensors = {name: torch.from_numpy(values) for name, values in pixels.items()}
    return tensors | {"pixel_values": tensors["pixel_values"].to(model.dtype)}
