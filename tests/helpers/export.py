"""Models of every family, what they are exported to, and how close a graph must come."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.tiny_models import DECODERS, FAMILIES, MAX_POSITIONS, _fill

from adalink.export.base.grouped_attention import WINDOWS_SINCE
from adalink.export.base.kv_cache import CACHE_SINCE
from adalink.runtime.ort.session import is_older
from adalink.runtime.storage.manifest import Manifest

Array = np.ndarray[Any, Any]

LENGTH = 20
SHORT = 13
WINDOW = 8


def windowed_mistral():
    from transformers import MistralForCausalLM

    config = copy.deepcopy(DECODERS["mistral"]().config)
    config.sliding_window = WINDOW
    return _fill(MistralForCausalLM(config), 15)


def windowed_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    values = DECODERS["qwen2"]().config.to_dict()
    for name in ("layer_types", "sliding_window", "max_window_layers", "use_sliding_window"):
        values.pop(name)
    config = Qwen2Config(**values, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    return _fill(Qwen2ForCausalLM(config), 16)


def roberta():
    from transformers import RobertaConfig, RobertaModel

    values = FAMILIES["bert"]().config.to_dict() | {"max_position_embeddings": MAX_POSITIONS + 2, "pad_token_id": 1}
    return _fill(RobertaModel(RobertaConfig(**{k: v for k, v in values.items() if k != "model_type"})), 17)


def xlm_roberta():
    from transformers import XLMRobertaConfig, XLMRobertaModel

    values = roberta().config.to_dict()
    return _fill(XLMRobertaModel(XLMRobertaConfig(**{k: v for k, v in values.items() if k != "model_type"})), 18)


def distilbert():
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=96, dim=48, hidden_dim=80, n_layers=2, n_heads=4, max_position_embeddings=64)
    return _fill(DistilBertModel(config), 19)


def narrow_llama():
    """Heads too narrow for grouped attention: the fused graph keeps attention in standard operators."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = DECODERS["llama"]().config.to_dict() | {"head_dim": 12}
    return _fill(LlamaForCausalLM(LlamaConfig(**values)), 20)


ALL_DECODERS = {**DECODERS, "mistral-windowed": windowed_mistral, "qwen2-windowed": windowed_qwen2}
WINDOWED = ("gemma3", "mistral-windowed", "qwen2-windowed")
ALL_ENCODERS = {"bert": FAMILIES["bert"], "roberta": roberta, "xlm-roberta": xlm_roberta, "distilbert": distilbert}
MODELS = {**ALL_DECODERS, "llama-narrow": narrow_llama, **ALL_ENCODERS, "t5": FAMILIES["t5"]}


@dataclass
class Exported:
    """A model, its deployment and the sessions on it."""

    model: Any
    manifest: Manifest
    graph: ort.InferenceSession
    decoder: ort.InferenceSession | None

    def embed(self, ids: torch.Tensor) -> Array:
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids).numpy()

    def empty_cache(self, batch: int) -> dict[str, Array]:
        cache = self.manifest.base.cache
        shape = (batch, cache.kv_heads, 0, cache.head_dim)
        names = [f"past_key_values.{i}.{part}" for i in range(cache.layers) for part in ("key", "value")]
        return {name: np.zeros(shape, np.float32) for name in names}


def open_exported(model: Any, manifest: Manifest, out: Path, target: str) -> Exported:
    variant = manifest.variants[target]
    decoder = ort.InferenceSession(str(out / variant.decoder_graph)) if variant.decoder_graph else None
    return Exported(model, manifest, ort.InferenceSession(str(out / variant.graph)), decoder)


def yardstick(model: Any, **inputs: Any) -> tuple[Array, float]:
    """PyTorch's float32 result and a limit for another float32 evaluation of the same function.

    Graph and PyTorch round the same sums in other orders, so the graph may be as far from the exact result as PyTorch
    itself, measured against float64, and the two may err to opposite sides: a factor of two. Another factor of four
    covers the spread between orders, since one evaluation's largest error is a sample. Norms and softmax stay in
    float32 in the float64 model, which makes the yardstick shorter, not longer.
    """
    with torch.no_grad():
        plain = first_output(model(**inputs))
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        exact = first_output(copy.deepcopy(model).double()(**wide))
    return plain.numpy(), 8 * float((plain - exact).abs().max())


def first_output(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def difference(received: Array, expected: Array) -> float:
    assert received.shape == expected.shape
    assert received.dtype == expected.dtype
    assert np.isfinite(received).all()
    return float(np.abs(received - expected).max())


def in_half(model: Any) -> Any:
    """The model computing in float32 with weights rounded to float16; rotary frequencies are no weights."""
    rounded = copy.deepcopy(model).half().float()
    for name, values in model.named_buffers():
        if "inv_freq" in name:
            owner, _, own = name.rpartition(".")
            setattr(rounded.get_submodule(owner), own, values)
    return rounded


needs_int8_cache = pytest.mark.skipif(
    is_older(ort.__version__, CACHE_SINCE), reason=f"an int8 KV cache takes ONNX Runtime {CACHE_SINCE}"
)


def skip_windows_of_old(family: str) -> None:
    """Skip a test of the operator or of what it makes possible, where it is not taken for a family."""
    if family in WINDOWED and is_older(ort.__version__, WINDOWS_SINCE):
        pytest.skip(f"ONNX Runtime {ort.__version__} computes windows wrongly, so they stay in standard operators")
