"""Patch settings of an image processor, for images that keep their shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError
from adalink.runtime.vision.patches import Patching
from adalink.training.models.tiles import processor_name

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

_PROCESSOR = "Qwen2VLImageProcessor"


def read_patching(processor: BaseImageProcessor) -> Patching:
    """How an image processor cuts images into patches.

    Raises:
        ModelError: it is another kind of processor, or does not resize images to a whole number of patches.
    """
    name = processor_name(processor)
    if name != _PROCESSOR:
        raise ModelError(f"image processor {name} is not supported for this model; expected {_PROCESSOR}")
    values = processor.to_dict()
    size = dict(values["size"])
    least, most = size.get("shortest_edge"), size.get("longest_edge")
    if not values.get("do_resize") or not least or not most:
        raise ModelError(
            f"image processor {name} resizes to {size if values.get('do_resize') else 'no size'}: expected do_resize "
            "with a shortest_edge and a longest_edge in size, which it takes for the least and the most pixels"
        )
    return Patching(
        least_pixels=int(least),
        most_pixels=int(most),
        edge=int(values["patch_size"]),
        merge=int(values["merge_size"]),
        frames=int(values["temporal_patch_size"]),
    )
