"""Models that take images beside text: where their image embeddings appear, and which token stands for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Model types whose projector gives nothing but image embeddings, which then replace those of one placeholder token.
_LLAVA_LIKE = ("llava",)


@dataclass(frozen=True)
class ImageSide:
    """The image side of a model.

    Attributes:
        projector: the module whose output, of shape ``(images, tokens, d)``, is merged with the text embeddings.
        image_token_id: the placeholder that is replaced, once for each row of an image's embeddings.
    """

    projector: nn.Module
    image_token_id: int


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model is fed with images, in whatever way."""
    return getattr(model.config, "vision_config", None) is not None


def image_side(model: PreTrainedModel) -> ImageSide | None:
    """The image side of a LLaVA-like model; ``None`` for any other."""
    if model.config.model_type not in _LLAVA_LIKE:
        return None
    return ImageSide(model.base_model.multi_modal_projector, model.config.image_token_id)


def check_modalities(model: PreTrainedModel, modalities: tuple[str, ...]) -> None:
    """Check that a model that takes images can be adapted so; raises ``ModelError``."""
    name = type(model).__name__
    if not takes_images(model):
        return
    if image_side(model) is None:
        if modalities != ("text",):
            raise ModelError(
                f"{name} takes images in a way that is not supported (only {', '.join(_LLAVA_LIKE)} is): its text "
                f"alone can be adapted, so use modalities ('text',) and not {modalities}"
            )
    elif unknown := [modality for modality in modalities if modality not in ("text", "image")]:
        raise ModelError(
            f"{name} is fed with text and images, and the adapter has the modality {unknown[0]!r}: use the names "
            "'text' and 'image'"
        )
