"""A KV cache in 8 bits in PyTorch: attention over the engine's own codes.

A number on the edge between two codes rounds either way, and what follows from it is no error. So the reference takes
each code as the engine stored it, and notes how far its own number lies from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array

_NAME = "adalink_stored_cache"


def read_scales(graph: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Scales of a graph with an int8 cache, by name of the cache input: shape ``(1, kv_heads, 1, head_dim)``."""
    import onnx
    from onnx import numpy_helper

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return {
        tensor.name.removesuffix(".scale"): np.asarray(numpy_helper.to_array(tensor))
        for tensor in tensors
        if tensor.name.startswith("past_key_values.") and tensor.name.endswith(".scale")
    }


@contextmanager
def stored_cache(model: Any, codes: Mapping[str, Array], scales: Mapping[str, Array]) -> Iterator[list[float]]:
    """Let a decoder of transformers attend to stored keys and values, one row at a time.

    Args:
        model: the decoder.
        codes: by name of a cache input, int8 with shape ``(kv_heads, tokens, head_dim)``.
        scales: from ``read_scales``.

    Yields:
        For each key and value tensor that was replaced, the largest distance of the model's own numbers from the codes,
        in steps of the code; 0.5 is the most that rounding gives.
    """
    import torch
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    distances: list[float] = []

    def stored(states: Any, name: str) -> Any:
        scale = torch.from_numpy(np.array(scales[name])).to(states.dtype)
        code = torch.from_numpy(np.array(codes[name]))[None].to(states.dtype)
        distances.append(float((states / scale - code).abs().max()))
        return code * scale

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any) -> Any:
        stem = f"past_key_values.{module.layer_idx}"
        key, value = stored(key, f"{stem}.key"), stored(value, f"{stem}.value")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [config._attn_implementation for config in configs]
    model.set_attn_implementation(_NAME)
    try:
        yield distances
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        # A registered function stays for good, and would keep the codes in memory.
        AttentionInterface.register(_NAME, sdpa_attention_forward)
