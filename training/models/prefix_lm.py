"""Prefix language models: bidirectional attention within the prompt, causal attention after it.

PaliGemma is one: every prompt position, image or text, attends to the whole prompt. The model gets the extent of the
prompt as ``token_type_ids``. The form of its prompts is that of transformers' ``PaliGemmaProcessor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.vision_schema import PromptForm
from adalink.training.models.vision import image_side

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def has_bidirectional_prompt(model: PreTrainedModel) -> bool:
    """Whether every prompt position attends to the whole prompt."""
    side = image_side(model)
    return side is not None and side.bidirectional_prompt


def prompt_inputs(model: PreTrainedModel, is_prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs that mark the prompt; none for a causal prompt.

    Args:
        model: any base.
        is_prompt: bool with shape ``(batch, seq)``; values at padding do not matter.

    Returns:
        ``token_type_ids``, int64 with shape ``(batch, seq)``, 0 for the prompt and 1 for what follows; or nothing.
    """
    return {"token_type_ids": (~is_prompt).long()} if has_bidirectional_prompt(model) else {}


def prompt_form(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PromptForm | None:
    """The form of a model's prompts; ``None`` for one that takes prompts as they are.

    Raises:
        ModelError: the tokenizer lacks the tokens that the form needs.
    """
    side = image_side(model)
    if side is None or not side.bidirectional_prompt:
        return None
    image, begin = tokenizer.convert_ids_to_tokens(side.image_token_id), tokenizer.bos_token
    ids = tokenizer(f"{image}{image}{begin}", add_special_tokens=False)["input_ids"]
    if ids != [side.image_token_id, side.image_token_id, tokenizer.bos_token_id]:
        raise ModelError(
            f"the tokenizer reads '{image}{image}{begin}' as {ids}; expected token {side.image_token_id}, the "
            f"placeholder, twice, and the token that begins a text, as {type(model).__name__} writes in front of its "
            "prompts: both must be special tokens; use the tokenizer that this model was trained with"
        )
    return PromptForm(image=image, before=begin, after="\n")
