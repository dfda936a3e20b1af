"""Soft prompts: trained embeddings prepended to each sequence, which callers never see.

Hooks on the model's body, the module between embeddings and head, prepend them to its inputs and strip them from its
outputs. So logits, losses and ``generate`` keep the caller's ids, masks and lengths.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adalink.runtime.errors import ModelError, RequestError
from adalink.training.models.vision import image_side, takes_images

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


def draw_soft_prompt(embedding: nn.Module, vocab_size: int, count: int) -> nn.Parameter:
    """Initial vectors: the embeddings of ``count`` random tokens, float32 with shape ``(count, d)``.

    Args:
        embedding: the model's embedding module, without an adapter.
        vocab_size: size of the vocabulary.
        count: number of vectors; tokens are drawn with PyTorch's seed.
    """
    ids = torch.randint(vocab_size, (count,))
    with torch.no_grad():
        return nn.Parameter(embedding(ids.to(next(embedding.parameters()).device)).float().clone())


class SoftPromptHooks:
    """Prepends a soft prompt to every row of a decoder or encoder, until the handles are removed.

    - It goes between a row's left padding, the masked columns before its first token, and that token.
    - Position ids from the caller are shifted by its length; those that the model counts itself follow by themselves.
    - A call with a non-empty KV cache continues a row that has its soft prompt already.
    - Its outputs are stripped: ``last_hidden_state`` and ``hidden_states`` have the caller's columns, and a pooler gets
      the caller's first column. Attention weights keep all columns.

    Args:
        model: the base.
        vectors: the soft prompt, with shape ``(n, d)``.

    Raises:
        ModelError: an encoder-decoder, a model with a bidirectional prompt, or one that takes images in a way that is
            not supported.
    """

    def __init__(self, model: PreTrainedModel, vectors: nn.Parameter) -> None:
        self._vectors = vectors
        self._body = _body(model)
        self._parameters = inspect.signature(self._body.forward).parameters
        self._lead: torch.Tensor | None = None  # in a prefill: columns before each row's first token

    def install(self) -> list[RemovableHandle]:
        """Install the hooks on the body."""
        return [
            self._body.register_forward_pre_hook(self._prepend, with_kwargs=True),
            self._body.register_forward_hook(self._strip, always_call=True),
        ]

    def _prepend(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = dict(zip(self._parameters, args, strict=False)) | kwargs
        mask, cache = call.get("attention_mask"), call.get("past_key_values")
        embeds = call.get("inputs_embeds")
        batch, length = (call["input_ids"] if embeds is None else embeds).shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        has_matrix = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        if not has_matrix or getattr(cache, "is_compileable", False):
            raise RequestError(
                "attention_mask has a shape for a cache of fixed length, or there is such a cache, which knows of no "
                "soft prompt: give a mask with shape (batch, seq), and the cache that generate makes by itself"
            )
        count = len(self._vectors)
        positions = call.get("position_ids")
        received = past + length - count  # the caller's positions in cache and call
        expected = received
        if mask is not None:
            expected = mask.shape[1]
        elif positions is not None:
            expected = int(positions.max()) + 1
        if past and received != expected:
            raise RequestError(
                f"the KV cache holds {past} positions and the call brings {length}, expected {expected + count} in "
                f"all, the caller's and a soft prompt of {count}: do not start from another model's cache, nor cut it "
                "to the length of the tokens"
            )
        lead = torch.zeros(batch, dtype=torch.int64, device=self._vectors.device)
        if mask is not None:
            lead = (mask.cumsum(dim=1) == 0).sum(dim=1)
            call["attention_mask"] = _insert(mask, mask.new_ones(batch, count), lead)
        if past:
            if positions is not None:
                call["position_ids"] = positions + count
            return (), call
        if embeds is None:
            embeds = module.get_input_embeddings()(call.pop("input_ids"))
        vectors = self._vectors.to(embeds.dtype).expand(batch, -1, -1)
        call["inputs_embeds"] = _insert(embeds, vectors, lead)
        if positions is not None:
            positions = positions.expand(batch, -1)
            first = positions.gather(1, lead.clamp(max=length - 1).unsqueeze(1))
            soft_positions = first + torch.arange(count, device=first.device)
            call["position_ids"] = _insert(positions + count, soft_positions, lead)
        types = call.get("token_type_ids")
        if types is not None:
            call["token_type_ids"] = _insert(types, types.new_zeros(batch, count), lead)
        self._lead = lead
        return (), call

    def _strip(self, module: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
        lead, self._lead = self._lead, None
        if lead is None or output is None:  # a later step, or a call that failed
            return output
        count = len(self._vectors)
        pooler = getattr(module, "pooler", None)
        if isinstance(output, tuple):
            hidden = _remove(output[0], count, lead)
            return (hidden, *output[1:]) if pooler is None else (hidden, pooler(hidden), *output[2:])
        output.last_hidden_state = _remove(output.last_hidden_state, count, lead)
        if pooler is not None:
            output.pooler_output = pooler(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(_remove(states, count, lead) for states in output.hidden_states)
        return output


def _body(model: PreTrainedModel) -> PreTrainedModel:
    """The module that takes embeddings, a mask and a cache, and gives hidden states; raises ``ModelError``."""
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder, which takes no soft prompt here: use soft_tokens = 0"
        )
    side = image_side(model)
    if side is not None and side.bidirectional_prompt:
        raise ModelError(
            f"{type(model).__name__} decides in front of its language model what each position sees, and would not see "
            "a soft prompt: use soft_tokens = 0"
        )
    if side is not None and not side.takes_patches:
        return side.language_model
    if takes_images(model):  # or computes position ids from images itself
        raise ModelError(
            f"{type(model).__name__} takes images in a way that no soft prompt can stand before: use soft_tokens = 0"
        )
    return model.base_model


def _insert(rows: torch.Tensor, new: torch.Tensor, lead: torch.Tensor) -> torch.Tensor:
    """``new``, ``(batch, n, ...)``, inserted into ``rows``, ``(batch, seq, ...)`` after ``lead`` columns."""
    joined = torch.cat([new.to(rows.dtype), rows], dim=1)
    if not lead.any():
        return joined
    count, column = new.shape[1], torch.arange(joined.shape[1], device=rows.device)
    start = lead.unsqueeze(1)
    order = torch.where(column < start, column + count, torch.where(column < start + count, column - start, column))
    return joined[torch.arange(len(rows), device=rows.device).unsqueeze(1), order]


def _remove(rows: torch.Tensor, count: int, lead: torch.Tensor) -> torch.Tensor:
    """``rows`` without the columns that ``_insert`` added."""
    if not lead.any():
        return rows[:, count:]
    column = torch.arange(rows.shape[1] - count, device=rows.device)
    order = column + count * (column >= lead.unsqueeze(1))
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), order]
