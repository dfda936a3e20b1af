"""Methods of adaptation on a base model: AdaLink by the kit, the others by PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adalink.runtime.errors import ConfigError, ModelError
from adalink.training.method.attach import AdaLinkModel, attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import input_embedding
from studies.experiment.settings import (
    AdaLinkMethod,
    FullMethod,
    LoraMethod,
    Method,
    PromptTuningMethod,
    PTuningMethod,
    ZeroShotMethod,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Tuned(nn.Module):
    """A base with a method on it, the same to call whatever the method.

    Attributes:
        base: the base model, with LoRA's layers in it, or with AdaLink's hooks on its input.
        added: modules of the method outside the base: an adapter, or the encoder of a soft prompt.
        attached: AdaLink's, where that is the method.
        soft_tokens: embeddings that ``embed`` puts before the text; AdaLink's own soft prompt is unseen here.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        added: nn.Module | None = None,
        soft_prompt: Any = None,
        attached: AdaLinkModel | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.added = added
        self.attached = attached
        # A bound method of PEFT's model, whose encoder is registered as `added`: batch size -> (batch, tokens, d).
        self._soft_prompt = soft_prompt
        self.soft_tokens = 0 if soft_prompt is None else int(soft_prompt(1).shape[1])

    def embed(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adapted embeddings, the soft prompt before them.

        Args:
            ids: int64 with shape ``(batch, seq)``.
            mask: int64 with shape ``(batch, seq)``, 0 for padding.

        Returns:
            embeddings with shape ``(batch, soft + seq, d)`` and their mask.
        """
        embeds = self.base.get_input_embeddings()(ids)
        if self._soft_prompt is None:
            return embeds, mask
        prompt = self._soft_prompt(len(ids)).to(embeds.dtype)
        return torch.cat([prompt, embeds], dim=1), torch.cat([mask.new_ones(prompt.shape[:2]), mask], dim=1)

    @property
    def trained_parameters(self) -> int:
        """Numbers that the optimizer changes."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def tune(base: PreTrainedModel, method: Method) -> Tuned:
    """Put a method on ``base``, which it changes: give it a copy.

    Raises:
        ConfigError: the method cannot be put on this base.
        ModelError: the base is an encoder-decoder, or has no single input embedding.
    """
    if base.config.is_encoder_decoder:
        raise ModelError(
            f"{type(base).__name__} is an encoder-decoder: a study takes decoders and encoders; leave that base out"
        )
    if getattr(base, "pooler", None) is not None:
        base.pooler = None  # texts are embedded by the mean over tokens: it would be trained by nothing
    if isinstance(method, (FullMethod, ZeroShotMethod)):
        base.requires_grad_(isinstance(method, FullMethod))
        return Tuned(base)
    if isinstance(method, AdaLinkMethod):
        config = AdaLinkConfig(
            rank=method.rank, activation=method.activation, soft_tokens=method.tokens, init=method.init
        )
        attached = attach(base, config)
        return Tuned(base, attached.adapters, attached=attached)
    return _by_peft(base, method)


def _by_peft(base: PreTrainedModel, method: PromptTuningMethod | PTuningMethod | LoraMethod) -> Tuned:
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            # The head keeps the base's matrix while LoRA is on the embeddings: that is what is studied.
            warnings.filterwarnings("ignore", message=".*tie.*", module="peft")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            peft_model = get_peft_model(base, _peft_config(base, method))
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"method {method.name!r} does not fit {type(base).__name__}: PEFT says: {error}; leave out one of them"
        ) from error
    if isinstance(method, LoraMethod):
        return Tuned(peft_model.get_base_model())
    return Tuned(base, peft_model.prompt_encoder, peft_model.get_prompt)


def _peft_config(base: PreTrainedModel, method: PromptTuningMethod | PTuningMethod | LoraMethod) -> Any:
    from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig

    task = "CAUSAL_LM" if base.can_generate() else "FEATURE_EXTRACTION"
    if isinstance(method, PromptTuningMethod):
        return PromptTuningConfig(
            task_type=task, num_virtual_tokens=method.tokens, prompt_tuning_init="SAMPLE_VOCAB"
        )  # fmt: skip
    if isinstance(method, PTuningMethod):
        return PromptEncoderConfig(
            task_type=task, num_virtual_tokens=method.tokens, encoder_hidden_size=method.hidden
        )  # fmt: skip
    return LoraConfig(
        task_type=task,
        r=method.rank,
        lora_alpha=2 * method.rank,
        lora_dropout=0.0,
        target_modules={
            "attention": None,  # PEFT's own choice for the architecture: queries and values
            "all-linear": "all-linear",
            "embeddings": [_embedding_name(base)],
        }[method.targets],
    )


def _embedding_name(base: PreTrainedModel) -> str:
    embedding = input_embedding(base)
    names: dict[Any, str] = {module: name for name, module in base.named_modules()}
    return names[embedding]
