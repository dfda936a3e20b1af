"""Soft prompts, tables of token ids and KV prefixes in PyTorch, as ``inputs_embeds`` and cache of a model.

`adalink.training` attaches soft prompts by hooks. This implementation is independent of it, because levels 2 to 6 are
the test of what training ships. A bottleneck beside them is attached as always: the embedding's output is captured,
and the soft prompt is put before it.
The cache that holds a KV prefix is transformers' own, which numbers the positions after it itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, TABLE_NAME, Adapter, make_adapter
from adalink.runtime.storage.adapter_spec import AdapterSpec
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME

if TYPE_CHECKING:
    import torch


class InputSide:
    """The soft prompt, the table of token ids and the KV prefix of one adapter.

    Attributes:
        soft_tokens: positions of the soft prompt.
    """

    def __init__(self, adapter: Adapter) -> None:
        import torch

        config = adapter.config
        self.soft_tokens = config.soft_tokens
        self._scope = config.scope
        self._weights = {
            name: torch.from_numpy(value).double()
            for name, value in adapter.weights.items()
            if name in (SOFT_PROMPT_NAME, TABLE_NAME, KV_PREFIX_NAME) or config.input == "ids"
        }

    def embeds(
        self, model: Any, row: torch.Tensor, prompt_length: int | None, is_text: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """Input embeddings of a row, with shape ``(1, soft_tokens + seq, d)``.

        Args:
            model: with the adapter's bottleneck attached, if it has one.
            row: token ids, shape ``(1, seq)``.
            prompt_length: length of the prompt within the row; all of it by default.
            is_text: positions of text, bool with shape ``(1, seq)``; the others are not adapted.
            inputs: the row's images, as inputs of the model.
        """
        import torch

        x = _embedded(model, row, inputs)
        if TABLE_NAME in self._weights:
            delta = self._weights[TABLE_NAME][row] @ self._weights["text.up.weight"].T
            is_adapted = is_text
            if self._scope == "prompt" and prompt_length is not None:
                is_adapted = is_adapted & (torch.arange(row.shape[1]) < prompt_length)
            x = torch.where(is_adapted[..., None], x + delta.to(x.dtype), x)
        soft = self._weights.get(SOFT_PROMPT_NAME)
        return x if soft is None else torch.cat([soft[None].to(x.dtype), x], dim=1)

    def cache_inputs(self, model: Any, embeds: torch.Tensor) -> dict[str, Any]:
        """The cache that holds the KV prefix, and the mask of it and the row; nothing without one.

        Args:
            model: the model.
            embeds: the row's embeddings, shape ``(1, soft_tokens + seq, d)``.
        """
        import torch
        from transformers import DynamicCache

        states = self._weights.get(KV_PREFIX_NAME)
        if states is None:
            return {}
        cache: Any = DynamicCache(config=model.config.get_text_config())
        for layer, (key, value) in enumerate(states.to(embeds.dtype)):
            cache.update(key[None], value[None], layer)
        mask = torch.ones(1, states.shape[3] + embeds.shape[1], dtype=torch.int64)
        return {"past_key_values": cache, "attention_mask": mask}


def has_input_side(config: AdapterSpec) -> bool:
    """Whether an adapter has more than a bottleneck on embeddings and a head."""
    return bool(config.soft_tokens or config.kv_prefix or config.input == "ids")


def without_input_side(adapter: Adapter) -> Adapter | None:
    """The bottleneck of an adapter alone; ``None`` if there is none that takes embeddings."""
    config = adapter.config
    if config.input == "ids" or not config.rank:
        return None
    weights = {name: value for name, value in adapter.weights.items() if name not in (SOFT_PROMPT_NAME, KV_PREFIX_NAME)}
    return make_adapter(msgspec.structs.replace(config, soft_tokens=0, kv_prefix=None), weights)


class _EnoughError(Exception):
    """Ends a forward pass once the embedding's output is captured."""


def _embedded(model: Any, row: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Output of the input embedding in a forward pass of the model, with shape ``(1, seq, d)``."""
    from adalink.training.models.loading import input_embedding

    caller = model.get_encoder() if model.config.is_encoder_decoder else model
    outputs: list[torch.Tensor] = []

    def catch(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        outputs.append(output)
        raise _EnoughError

    handle = input_embedding(caller).register_forward_hook(catch)
    try:
        caller(input_ids=row, **inputs)
    except _EnoughError:
        return outputs[0]
    finally:
        handle.remove()
    raise AssertionError("a model embeds its tokens")
