"""Image preprocessing: a model's image processor as the steps that the runtime applies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError
from adalink.runtime.vision.preprocess import Preprocessor
from adalink.training.models.patches import read_patching
from adalink.training.models.tiles import processor_name, read_tiling

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

# Image processors whose steps `Preprocessor` has, beside those for tiles and patches.
_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")


def describe_processor(
    processor: BaseImageProcessor | None,
    image_size: tuple[int, int],
    *,
    takes_tiles: bool = False,
    takes_patches: bool = False,
) -> Preprocessor:
    """The steps of an image processor.

    Args:
        processor: the model's image processor.
        image_size: height and width that the vision tower takes, of an image or of a tile.
        takes_tiles: whether the model takes images as tiles.
        takes_patches: whether it takes them as patches; ``adalink.export.vision.patches.check_patching`` checks those.

    Raises:
        ModelError: there is none, it has other steps, or its output does not fit the vision tower.
    """
    if processor is None:
        raise ModelError(
            "this model takes images and no image processor was found: put preprocessor_config.json beside the "
            "checkpoint, or pass image_processor="
        )
    name = processor_name(processor)
    tiling = read_tiling(processor) if takes_tiles else None
    patching = read_patching(processor) if takes_patches else None
    if tiling is None and patching is None and name not in _PROCESSORS:
        raise ModelError(f"image processor {name} is not supported; expected one of {', '.join(_PROCESSORS)}")
    values = processor.to_dict()
    if not isinstance(values.get("resample"), int):
        raise ModelError(f"image processor {name} names no filter: set its resample, to 2 (bilinear) or 3 (bicubic)")
    normalizes = bool(values.get("do_normalize"))
    no_resizing: dict[str, Any] = {"pad_color": None, "shortest_edge": None, "resize": None, "crop": None}
    preprocessor = Preprocessor(
        **(no_resizing if tiling or patching else _steps_of_one(name, values)),
        tiling=tiling,
        patching=patching,
        resample=int(values["resample"]),
        rescale_factor=values["rescale_factor"] if values.get("do_rescale") else None,
        mean=_channels(values["image_mean"]) if normalizes else None,
        std=_channels(values["image_std"]) if normalizes else None,
    )
    if patching is not None:
        return preprocessor
    if tiling is not None:
        output_size: tuple[int, int] | None = (tiling.edge, tiling.edge)
    else:
        output_size = preprocessor.output_size
    if output_size != image_size:
        raise ModelError(
            f"image processor {name} gives images of {output_size or 'any size'}, the vision tower takes "
            f"{image_size}: set its {'max_image_size' if tiling else 'crop_size'} to that"
        )
    return preprocessor


def _steps_of_one(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Steps for an image that is not cut, before its values are scaled."""
    size, crop = dict(values["size"]), dict(values.get("crop_size") or {})
    edge, sides = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    resizes, crops = bool(values.get("do_resize")), bool(values.get("do_center_crop"))
    if resizes and (size.get("longest_edge") or (edge is None and None in sides)):
        raise ModelError(f"image processor {name} resizes to {size}; expected a shortest_edge, or a height and width")
    pads = bool(values.get("do_pad"))
    if pads and name != "LlavaImageProcessor":
        raise ModelError(f"image processor {name} pads (do_pad), which only LlavaImageProcessor is known to do")
    return {
        "pad_color": tuple(int(mean * 255) for mean in _channels(values["image_mean"] or 0)) if pads else None,
        "shortest_edge": edge if resizes else None,
        "resize": None if not resizes or edge is not None else (int(size["height"]), int(size["width"])),
        "crop": (int(crop["height"]), int(crop["width"])) if crops else None,
    }


def _channels(numbers: Any) -> tuple[float, float, float]:
    """One number per channel; processors hold three, or one for all."""
    red, green, blue = (numbers,) * 3 if isinstance(numbers, (int, float)) else numbers
    return red, green, blue
