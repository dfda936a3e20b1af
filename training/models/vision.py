"""Vision-language models: where their image embeddings appear, and their placeholder token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError
from adalink.training.models.hub_access import download_options

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

# Model types whose projector's output is image embeddings alone, which replace those of a placeholder token: the names
# of the projector and of the language model.
_SIDES = {
    "llava": ("multi_modal_projector", "language_model"),
    "fast_vlm": ("multi_modal_projector", "language_model"),
    "paligemma": ("multi_modal_projector", "language_model"),
    "idefics3": ("connector", "text_model"),
    "smolvlm": ("connector", "text_model"),
    "qwen2_vl": ("visual.merger", "language_model"),
    "qwen2_5_vl": ("visual.merger", "language_model"),
    "qwen3_vl": ("visual.merger", "language_model"),
}
# Those that cut an image into tiles (adalink.training.models.tiles).
_TAKE_TILES = ("idefics3", "smolvlm")
# Those that take an image as patches in a grid of its own shape, which position ids follow
# (adalink.runtime.vision.patches).
_TAKE_PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Those with a bidirectional prompt (adalink.training.models.prefix_lm).
_BIDIRECTIONAL_PROMPT = ("paligemma",)
SUPPORTED = (
    "LlavaForConditionalGeneration, FastVlmForConditionalGeneration, PaliGemmaForConditionalGeneration, "
    "Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration, Qwen2VLForConditionalGeneration, "
    "Qwen2_5_VLForConditionalGeneration and Qwen3VLForConditionalGeneration"
)


@dataclass(frozen=True)
class ImageSide:
    """The image side of a model.

    Attributes:
        projector: the module whose output, with shape ``(images, tokens, d)``, is merged with the text embeddings. With
            tiles the shape is ``(tiles, tokens, d)``; with patches it is ``(tokens, d)``, of all images.
        language_model: the language model behind the merge, without its head.
        image_token_id: the placeholder that is replaced, once for each row of an image's embeddings.
        takes_tiles: whether ``pixel_values`` are tiles of images, with shape ``(rows, tiles, 3, height, width)``.
        takes_patches: whether they are patches of images that keep their shape, concatenated with shape
            ``(patches, numbers)``, beside ``image_grid_thw``.
        bidirectional_prompt: whether every prompt position attends to the whole prompt, images and text, and only later
            ones causally. ``token_type_ids`` mark the prompt (``adalink.training.models.prefix_lm``).
    """

    projector: nn.Module
    language_model: PreTrainedModel
    image_token_id: int
    takes_tiles: bool
    takes_patches: bool
    bidirectional_prompt: bool


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model takes images, in whatever way."""
    return getattr(model.config, "vision_config", None) is not None


def image_side(model: PreTrainedModel) -> ImageSide | None:
    """The image side of a model of a supported class; ``None`` for any other."""
    model_type = model.config.model_type
    if model_type not in _SIDES:
        return None
    projector, language_model = _SIDES[model_type]
    inner = model.base_model
    return ImageSide(
        projector=inner.get_submodule(projector),
        language_model=inner.get_submodule(language_model),
        image_token_id=model.config.image_token_id,
        takes_tiles=model_type in _TAKE_TILES,
        takes_patches=model_type in _TAKE_PATCHES,
        bidirectional_prompt=model_type in _BIDIRECTIONAL_PROMPT,
    )


def check_modalities(model: PreTrainedModel, modalities: tuple[str, ...]) -> None:
    """Check that a model can take adapters of these modalities; raises ``ModelError``."""
    name = type(model).__name__
    if not takes_images(model):
        return
    if image_side(model) is None:
        if modalities != ("text",):
            raise ModelError(
                f"{name} takes images in a way that is not supported ({SUPPORTED} are): its text alone can be "
                f"adapted, so use modalities ('text',) and not {modalities}"
            )
    elif unknown := [modality for modality in modalities if modality not in ("text", "image")]:
        raise ModelError(
            f"{name} is fed with text and images, and the adapter has the modality {unknown[0]!r}: use the names "
            "'text' and 'image'"
        )


def find_image_processor(spec: str | Path) -> BaseImageProcessor | None:
    """Image processor of a checkpoint, in its PIL form; ``None`` if it has none."""
    import PIL  # noqa: F401  # the command line names the extra of a module that is missing
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            str(spec), backend="pil", trust_remote_code=False, **download_options(spec)
        )
    except (OSError, ValueError):
        return None
