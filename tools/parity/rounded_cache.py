"""A KV cache in 8 bits in PyTorch: attention over keys and values that are rounded as the engine's graph says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Scales = Mapping[str, npt.NDArray[np.float32]]
_NAME = "adalink-rounded-cache"


def read_scales(graph: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Scales of a graph with an int8 cache, by name of the cache input: shape ``(1, kv_heads, 1, head_dim)``."""
    import onnx
    from onnx import numpy_helper

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return {
        tensor.name.removesuffix(".scale"): numpy_helper.to_array(tensor)
        for tensor in tensors
        if tensor.name.startswith("past_key_values.") and tensor.name.endswith(".scale")
    }


@contextmanager
def rounded_cache(model: Any, scales: Scales) -> Iterator[None]:
    """Let a decoder of transformers round its keys and values to the nearest code times its scale.

    Args:
        model: the decoder; its attention computes as before on what is rounded.
        scales: from ``read_scales``.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    def rounded(states: Any, name: str) -> Any:
        scale = torch.from_numpy(np.array(scales[name])).to(states.dtype)
        return (states / scale).round().clamp(-128, 127) * scale

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        stem = f"past_key_values.{module.layer_idx}"
        key, value = rounded(key, f"{stem}.key"), rounded(value, f"{stem}.value")
        return sdpa_attention_forward(module, query, key, value, mask, **settings)

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        # A registered function stays for good, and would keep the scales in memory.
        AttentionInterface.register(_NAME, sdpa_attention_forward)
