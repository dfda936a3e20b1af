"""Models that take images beside text: where their image embeddings appear, and which token stands for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Model types whose projector gives nothing but image embeddings, which then replace those of one placeholder token: for
# each, the names of its projector and of its language model, whether it takes pictures as tiles, and whether its prompt
# attends in both directions.
_SIDES = {
    "llava": ("multi_modal_projector", "language_model", False, False),
    "fast_vlm": ("multi_modal_projector", "language_model", False, False),
    "paligemma": ("multi_modal_projector", "language_model", False, True),
    "idefics3": ("connector", "text_model", True, False),
    "smolvlm": ("connector", "text_model", True, False),
}
SUPPORTED = (
    "LlavaForConditionalGeneration, FastVlmForConditionalGeneration, PaliGemmaForConditionalGeneration, "
    "Idefics3ForConditionalGeneration and SmolVLMForConditionalGeneration"
)


@dataclass(frozen=True)
class ImageSide:
    """The image side of a model.

    Attributes:
        projector: the module whose output, of shape ``(images, tokens, d)``, is merged with the text embeddings; of a
            model that takes tiles, ``(tiles, tokens, d)``.
        language_model: what the merged embeddings go to, without its head.
        image_token_id: the placeholder that is replaced, once for each row of an image's embeddings.
        takes_tiles: whether ``pixel_values`` are tiles of pictures, with shape ``(rows, tiles, 3, height, width)``.
        bidirectional_prompt: whether every position of a prompt sees all of the prompt, images and text, and only what
            follows attends causally. The model is told by ``token_type_ids`` (``adalink.training.prefix``).
    """

    projector: nn.Module
    language_model: PreTrainedModel
    image_token_id: int
    takes_tiles: bool
    bidirectional_prompt: bool


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model is fed with images, in whatever way."""
    return getattr(model.config, "vision_config", None) is not None


def image_side(model: PreTrainedModel) -> ImageSide | None:
    """The image side of a model of a supported class; ``None`` for any other."""
    if model.config.model_type not in _SIDES:
        return None
    projector, language_model, takes_tiles, bidirectional_prompt = _SIDES[model.config.model_type]
    inner = model.base_model
    return ImageSide(
        getattr(inner, projector),
        getattr(inner, language_model),
        model.config.image_token_id,
        takes_tiles,
        bidirectional_prompt,
    )


def check_modalities(model: PreTrainedModel, modalities: tuple[str, ...]) -> None:
    """Check that a model that takes images can be adapted so; raises ``ModelError``."""
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
