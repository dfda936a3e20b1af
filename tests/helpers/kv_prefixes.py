"""Tasks with KV prefixes, and the same answers from PyTorch: each row alone, with an initial cache."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from helpers.runtime import write_adapter
from helpers.soft_prompts import NO_ADAPTER, Soft
from helpers.tiny_models import FAMILIES, VOCAB_SIZE
from helpers.tiny_tokenizer import make_tokenizer
from transformers import DynamicCache

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime.storage.adapter import Adapter, AdapterConfig, make_adapter, weight_shapes
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME, KvPrefixSpec
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.manifest_io import read_manifest

SETTINGS: dict[str, dict[str, Any]] = {
    "words": {"rank": 4, "activation": "gelu", "bias": True, "scope": "all"},
    "before": {"rank": 0, **NO_ADAPTER, "kv_prefix": KvPrefixSpec(tokens=5)},
    "before-too": {"rank": 0, **NO_ADAPTER, "kv_prefix": KvPrefixSpec(tokens=5, dtype="float16")},
    "long": {"rank": 0, **NO_ADAPTER, "kv_prefix": KvPrefixSpec(tokens=11)},
    "all": {
        **{"rank": 3, "activation": "silu", "bias": True, "scope": "prompt"},
        **{"soft_tokens": 2, "kv_prefix": KvPrefixSpec(tokens=3)},
    },
    "ids": {"rank": 2, **NO_ADAPTER, "input": "ids", "kv_prefix": KvPrefixSpec(tokens=1)},
}
TASKS = [None, *SETTINGS]


def prefix_adapter(base: Base, seed: int, **settings: Any) -> Adapter:
    """A seeded adapter whose KV prefix has the size of real keys and values."""
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        base_fingerprint=base.fingerprint,
        hidden_size=base.hidden_size,
        **({"modalities": ("text",)} | settings),
    )
    assert base.cache is not None
    shapes = weight_shapes(config, VOCAB_SIZE, (base.cache.layers, base.cache.kv_heads, base.cache.head_dim))
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        scale = 1.0 if name == KV_PREFIX_NAME else 0.8 / np.sqrt(shape[-1])
        weights[name] = (rng.normal(size=shape) * scale).astype(np.float32)
    if config.kv_prefix is not None and config.kv_prefix.dtype == "float16":
        weights[KV_PREFIX_NAME] = weights[KV_PREFIX_NAME].astype(np.float16).astype(np.float32)
    return make_adapter(config, weights)


class Prefixed(Soft):
    """A deployment on disk, the PyTorch model it came from, and its adapters."""

    def cache(self, task: str | None, dtype: torch.dtype) -> DynamicCache:
        """A cache that holds a task's KV prefix."""
        cache = DynamicCache(config=self.model.config)
        states = None if task is None else self.adapters[task].weights.get(KV_PREFIX_NAME)
        for layer, (key, value) in enumerate(() if states is None else torch.tensor(states).to(dtype)):
            cache.update(key[None], value[None], layer)
        return cache

    def run(self, model: Any, ids: list[int], task: str | None, generated: int = 0) -> torch.Tensor:
        """Logits of one row, shape ``(1, soft + seq, vocab)``."""
        cache = self.cache(task, model.dtype)
        embeds = self.embeds(ids, task, generated).to(model.dtype)
        before = cache.get_seq_length()
        with torch.no_grad():
            logits: torch.Tensor = model(
                inputs_embeds=embeds,
                past_key_values=cache,
                attention_mask=torch.ones(1, before + embeds.shape[1], dtype=torch.int64),
            ).logits
        return logits

    def output(self, ids: list[int], task: str | None, **inputs: Any) -> tuple[np.ndarray, float]:
        """See ``Soft``."""
        found = [self.run(model, ids, task)[0] for model in (self.model, copy.deepcopy(self.model).double())]
        return found[0].numpy()[-len(ids) :], 8 * float((found[0] - found[1]).abs().max())

    def greedy(self, prompt: list[int], task: str | None, steps: int) -> list[int]:
        """See ``Soft``."""
        made: list[int] = []
        for _ in range(steps):
            token = int(self.run(self.model, [*prompt, *made], task, len(made))[0, -1].argmax())
            if token == 2:
                break
            made.append(token)
        return made


def build_prefixed(family: str, root: Any, **settings: Any) -> Prefixed:
    model, folder = FAMILIES[family](), root / "deployment"
    for target in ("onnxruntime-cpu", "portable"):
        export_base(model, folder, tokenizer=make_tokenizer(), target=target, **settings)
    base = read_manifest(folder).base
    adapters = {task: prefix_adapter(base, 90 + seed, **own) for seed, (task, own) in enumerate(SETTINGS.items())}
    export_adapters({task: write_adapter(root / task, adapter) for task, adapter in adapters.items()}, folder)
    return Prefixed(folder, model, adapters)
