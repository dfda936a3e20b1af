"""The method in PyTorch, said once more, in front of a transformers model: what a LoRA in any host must give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tiny_models import HIDDEN_SIZE
from torch.nn import functional

from adalink.runtime.storage.adapter import Adapter, AdapterConfig, make_adapter

NEW = 6
ACTIVATIONS = {
    "identity": lambda h: h,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def seeded_task(
    fingerprint: str, *, size: float = 0.5, seed: int = 1, width: int = HIDDEN_SIZE, **settings: Any
) -> Adapter:
    """A task of rank 3 that visibly changes what a tiny model does; ``size`` is that of ``up``'s numbers."""
    method = {"rank": 3, "activation": "gelu", "bias": True, "modalities": ("text",), "scope": "all", **settings}
    config = AdapterConfig(base_model_name_or_path="tiny", base_fingerprint=fingerprint, hidden_size=width, **method)
    rng = np.random.default_rng(seed)
    shapes = {"down.weight": (3, width), "up.weight": (width, 3)}
    if config.bias:
        shapes |= {"down.bias": (3,), "up.bias": (width,)}
    weights = {f"text.{name}": rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in weights:
        weights[name] *= np.float32(size / 0.5 if "up" in name else 1)
    return make_adapter(config, weights)


def adapted(model: Any, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """Adapted embeddings, float64 with shape ``(batch, seq, d)``, of a float64 model."""
    weights = {name.removeprefix("text."): torch.from_numpy(w).double() for name, w in adapter.weights.items()}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        hidden = functional.linear(embeds, weights["down.weight"], weights.get("down.bias"))
        hidden = ACTIVATIONS[adapter.config.activation](hidden)
        return embeds + functional.linear(hidden, weights["up.weight"], weights.get("up.bias"))


def reference(model: Any, adapter: Adapter, ids: torch.Tensor, new: int = NEW) -> tuple[np.ndarray, list[list[int]]]:
    """Outputs of the prompt, and tokens chosen greedily, of a model in float64 behind the method.

    Args:
        model: a tiny model.
        adapter: the task.
        ids: prompts with shape ``(rows, seq)``.
        new: how many tokens.
    """
    wide = copy.deepcopy(model).double()
    outputs, whole = None, ids
    for _ in range(new):
        with torch.no_grad():
            made = wide(inputs_embeds=adapted(wide, adapter, whole), attention_mask=torch.ones_like(whole))
        if not hasattr(made, "logits"):
            return made.last_hidden_state.numpy(), []
        outputs = made.logits.numpy() if outputs is None else outputs
        whole = torch.cat([whole, made.logits[:, -1:].argmax(-1)], dim=1)
    assert outputs is not None
    return outputs, whole[:, ids.shape[1] :].tolist()


def save_tiny(folder: Path, model: Any) -> Path:
    """Save a tiny model as a Hugging Face folder."""
    model.save_pretrained(folder)
    return folder
