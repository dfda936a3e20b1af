"""A tied model whose table may be the codes of its head in 8 bits."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from helpers.tiny_models import FAMILIES, VOCAB_SIZE, _fill

WIDTH, BLOCK, MIDDLE = 384, 128, 128


def tied(is_exact: bool) -> Any:
    """A tied llama whose table is codes of 8 bits, if ``is_exact``: each block reaches from -128 to 127 steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = copy.deepcopy(FAMILIES["llama"]().config).to_dict()
    changes = {"hidden_size": WIDTH, "head_dim": 96, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = _fill(LlamaForCausalLM(LlamaConfig(**values | changes)), 31)
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 256, (VOCAB_SIZE, WIDTH // BLOCK, BLOCK)).astype(np.float32) - MIDDLE
    codes[..., 5], codes[..., 9] = -MIDDLE, 127
    steps = 2.0 ** rng.integers(-9, -6, (VOCAB_SIZE, WIDTH // BLOCK, 1))
    if not is_exact:
        steps[-1] *= 1.1
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy((codes * steps).reshape(VOCAB_SIZE, WIDTH)))
    return model
