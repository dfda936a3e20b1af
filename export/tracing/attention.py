"""Attention of the exported graphs: one function for every model family, in place of transformers' own.

Transformers looks up its attention function by name, so the model's own code is traced unchanged around this one. The
function adds the mask that it gets and never builds one. Scores and softmax are float32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adalink.runtime.errors import ModelError

NAME = "adalink_export"
# Finite: a row with every key masked gives the mean of the values, never NaN. Far below any score: in every other row a
# masked key has a weight of exactly zero.
MASKED = -1e30


@contextmanager
def exportable_attention(model: Any) -> Iterator[None]:
    """Let ``model`` compute attention with ``plain_attention`` until the block ends."""
    from transformers import AttentionInterface, PreTrainedModel

    AttentionInterface.register(NAME, plain_attention)
    # Of inner models too: a convolutional tower has no attention, and does not take the outer model's setting.
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention in standard operators.

    Args:
        module: the attention module, for its ratio of query to key heads.
        query: shape ``(batch, heads, sequence, head_dim)``.
        key: shape ``(batch, kv_heads, total, head_dim)``; ``heads`` is a multiple of ``kv_heads``.
        value: shape ``(batch, kv_heads, total, head_dim)``.
        attention_mask: float32, added to the scores, shape ``(batch, 1, sequence or 1, total)``.
        scaling: factor of the scores; ``head_dim ** -0.5`` by default.
        position_bias: T5's relative bias, shape ``(1, heads, sequence, total)``.
        softcap: Gemma 2's cap on the scores, which is refused.

    Returns:
        The heads' outputs with shape ``(batch, sequence, ..., head_dim)``, and no weights.
    """
    if softcap is not None:
        raise ModelError(
            f"{type(module).__name__} caps its attention scores at {softcap}: the export cannot express it"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = getattr(module, "num_key_value_groups", 1)
    if scale != 1.0:
        query = query * scale
    if groups > 1:
        # Keys are broadcast over the query heads of their group, not copied.
        config: Any = module.config
        query = query.reshape(query.shape[0], config.num_key_value_heads, groups, query.shape[2], query.shape[3])
        key, value = key.unsqueeze(2), value.unsqueeze(2)
    scores = torch.matmul(query, key.transpose(-1, -2)).float()
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + (attention_mask.unsqueeze(2) if groups > 1 else attention_mask)
    output = torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)
    # The caller merges all dimensions behind the sequence.
    return (output.permute(0, 3, 1, 2, 4) if groups > 1 else output.transpose(1, 2)), None
