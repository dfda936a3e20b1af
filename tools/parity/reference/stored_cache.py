"""A KV cache in 8 bits in PyTorch: attention over the engine's own codes.

A number on the edge between two codes rounds either way, and what follows from it is no error. So the reference takes
each code as the engine stored it, and notes how far its own number lies from it. A number beyond the last code is
clipped to that, which is no error of the engine's: it is counted apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array

_NAME = "adalink_stored_cache"
_LEAST_CODE, _MOST_CODE = -128, 127


@dataclass
class CodeFigures:
    """How a model's own keys and values lie to the codes that replaced them.

    Attributes:
        distances: of each tensor, the largest distance of a number, clipped to the codes there are, from its code, in
            steps of the code; 0.5 is the most that rounding gives.
        clipped: numbers that were clipped.
        count: all numbers.
    """

    distances: list[float] = field(default_factory=list)
    clipped: int = 0
    count: int = 0

    @property
    def largest(self) -> float:
        """The largest distance; NaN if one is, or if no tensor was replaced."""
        return float(np.max(self.distances)) if self.distances else np.nan

    def add(self, other: CodeFigures) -> None:
        """Add the figures of another row."""
        self.distances += other.distances
        self.clipped += other.clipped
        self.count += other.count


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
def stored_cache(model: Any, codes: Mapping[str, Array], scales: Mapping[str, Array]) -> Iterator[CodeFigures]:
    """Let a decoder of transformers attend to stored keys and values, one row at a time.

    Args:
        model: the decoder.
        codes: by name of a cache input, int8 with shape ``(kv_heads, tokens, head_dim)``.
        scales: from ``read_scales``.

    Yields:
        Figures of the keys and values that were replaced, for all passes of the block.
    """
    import torch
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    figures = CodeFigures()

    def stored(states: Any, name: str) -> Any:
        scale = torch.from_numpy(np.array(scales[name])).to(states.dtype)
        code = torch.from_numpy(np.array(codes[name]))[None].to(states.dtype)
        own = states / scale
        within = own.clamp(_LEAST_CODE, _MOST_CODE)
        figures.distances.append(float((within - code).abs().max()))
        figures.clipped += int(((own - within).abs() > 0.5).sum())
        figures.count += own.numel()
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
        yield figures
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        # A registered function stays for good, and would keep the codes in memory.
        AttentionInterface.register(_NAME, sdpa_attention_forward)
