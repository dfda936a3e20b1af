"""The traced modules: a model behind flat, named tensors, with its attention mask built in one place.

``attention_mask`` becomes an additive float32 mask here, the same for each model family. Padding on the left stays
finite, and real positions do not attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from adalink.export.architectures import BARE_MASK
from adalink.export.tracing.attention import MASKED


class DecoderGraph(torch.nn.Module):
    """A causal language model as ``(inputs_embeds, attention_mask, position_ids, *past) -> (logits, *present)``."""

    def __init__(self, model: Any, masks: dict[str, int | None], bidirectional_prompt: bool = False) -> None:
        """Wrap a model.

        Args:
            model: the decoder.
            masks: window sizes by mask name (``adalink.export.architectures.mask_windows``).
            bidirectional_prompt: whether the prompt, a call without a past, attends in both directions.
        """
        super().__init__()
        self.model = model
        self.masks = masks
        self.mask_of = prompt_mask if bidirectional_prompt else causal_mask

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Logits and the grown cache.

        Args:
            inputs_embeds: shape ``(batch, sequence, d)``.
            attention_mask: shape ``(batch, past + sequence)``.
            position_ids: shape ``(batch, sequence)``, or ``(batch, sequence, axes)``.
            past: key and value of each layer in turn, shape ``(batch, kv_heads, past, head_dim)``.
        """
        masks = {name: self.mask_of(inputs_embeds, attention_mask, window) for name, window in self.masks.items()}
        cache = make_cache(past)
        output = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=masks.get(BARE_MASK, masks),
            position_ids=axes_first(position_ids),
            past_key_values=cache,
            use_cache=True,
        )
        return (output.logits, *cache_tensors(cache))


class EncoderGraph(torch.nn.Module):
    """An encoder as ``(inputs_embeds, attention_mask[, token_type_ids]) -> last_hidden_state``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Shapes: ``(batch, sequence, d)``, and twice ``(batch, sequence)``, to ``(batch, sequence, d)``."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(inputs_embeds=inputs_embeds, attention_mask=padding_mask(attention_mask), **types)
        return output.last_hidden_state  # type: ignore[no-any-return]


class CrossDecoderGraph(torch.nn.Module):
    """The decoder of an encoder-decoder: a cache for its own tokens, cross attention computed at each step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Shapes: as ``DecoderGraph``; encoder states ``(batch, source, d)``, their mask ``(batch, source)``."""
        cache = make_cache(past)
        output = self.model(
            encoder_outputs=(encoder_hidden_states,),
            attention_mask=padding_mask(encoder_attention_mask),
            decoder_inputs_embeds=inputs_embeds,
            decoder_attention_mask=causal_mask(inputs_embeds, attention_mask, None),
            past_key_values=EncoderDecoderCache(cache, _NoCache()),
            use_cache=True,
        )
        return (output.logits, *cache_tensors(cache))


class _NoCache(DynamicCache):  # type: ignore[misc]
    """A cache that stores nothing: keys and values are used once."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def make_cache(past: Sequence[torch.Tensor]) -> DynamicCache:
    """A cache of full length for every layer, sliding windows included: the mask ends a window, not the cache."""
    cache = DynamicCache()
    for key, value in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def cache_tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Key and value of each layer in turn."""
    layers: Any = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def causal_mask(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """Additive mask with shape ``(batch, 1, sequence, past + sequence)``.

    Args:
        inputs_embeds: shape ``(batch, sequence, d)``.
        attention_mask: 1 for real positions, shape ``(batch, past + sequence)``.
        window: positions that a query attends to, its own included; ``None`` for all.
    """
    keys, queries = _positions(inputs_embeds, attention_mask)
    return _additive(_causal(keys, queries, window)[None, None] & (attention_mask[:, None, None, :] != 0))


def prompt_mask(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """Likewise for a bidirectional prompt: in a call without a past, each position attends to all of its row.

    A window does not apply within the prompt, as in PaliGemma.
    """
    keys, queries = _positions(inputs_embeds, attention_mask)
    first, last = queries[:1], queries[-1:]
    # Positions behind the last one belong to a cache and are not written yet.
    in_prompt = (first == 0) & (keys <= last)
    is_visible = _causal(keys, queries, window) | in_prompt
    return _additive(is_visible[None, None] & (attention_mask[:, None, None, :] != 0))


def _positions(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the keys, ``(1, past + sequence)``, and of the queries, ``(sequence, 1)``."""
    total = attention_mask.shape[1]
    sequence = inputs_embeds.shape[1]
    keys = torch.arange(total)[None, :]
    queries = torch.arange(sequence)[:, None] + (total - sequence)
    return keys, queries


def _causal(keys: torch.Tensor, queries: torch.Tensor, window: int | None) -> torch.Tensor:
    is_past = keys <= queries
    return is_past if window is None else is_past & (queries - keys < window)


def axes_first(position_ids: torch.Tensor) -> torch.Tensor:
    """Position ids as models take them: ``(batch, sequence, axes)`` becomes ``(axes, batch, sequence)``."""
    return position_ids if position_ids.dim() == 2 else position_ids.permute(2, 0, 1)


def padding_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Additive mask with shape ``(batch, 1, 1, sequence)``."""
    return _additive(attention_mask[:, None, None, :] != 0)


def _additive(is_visible: torch.Tensor) -> torch.Tensor:
    return torch.where(is_visible, torch.tensor(0.0), torch.tensor(MASKED))
