"""A graph with an int8 KV cache stores the nearest codes, and computes what transformers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.export import ALL_DECODERS, needs_int8_cache, skip_windows_of_old
from helpers.tiny_models import bert, token_ids

from adalink.export.base.export import export_base
from adalink.export.base.kv_cache import export_kv_cache
from adalink.runtime import Deployment
from adalink.runtime.errors import BackendError, ConfigError, DeploymentError, GraphError
from adalink.runtime.ort.static_cache import StaticCacheDecodeState, StaticCacheEngine
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.reference.stored_cache import read_scales, stored_cache

pytestmark = needs_int8_cache
IDS = token_ids(0).numpy()
GRAPH = "base/onnxruntime-cpu/model.kv-int8.onnx"


def logits(model: Any, codes: Any = None, scales: Any = None) -> tuple[np.ndarray, float]:
    """Of transformers in float64 on the first row, with stored codes; and the largest distance of its own from them."""
    with torch.no_grad():
        if codes is None:
            return np.asarray(model(input_ids=torch.from_numpy(IDS[:1])).logits[0].numpy()), 0.0
        with stored_cache(model, codes, scales) as figures:
            values = model(input_ids=torch.from_numpy(IDS[:1])).logits[0].numpy()
    return np.asarray(values), figures.largest


def stepped(opened: Deployment) -> tuple[np.ndarray, np.ndarray]:
    """The first row token by token, its first half as one piece: logits from there on, and the codes in the cache."""
    engine, half = opened._runner.engine, IDS.shape[1] // 2
    assert isinstance(engine, StaticCacheEngine)
    embeds = opened.input_embeddings(IDS[:1])
    state = engine.open_slots(1, 4)  # grows on the way
    state.begin(None)
    state.extend({"inputs_embeds": embeds, "attention_mask": np.ones_like(IDS[:1])}, 0, half)
    rows = [state.logits[0].copy()]
    for place in range(half, IDS.shape[1]):
        state.step(embeds[:, place : place + 1])
        rows.append(state.logits[0].copy())
    return np.stack(rows), state.states(0, IDS.shape[1])


# Learned positions; windows; norms of queries and keys.
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen3"])
def test_int8_cache_holds_the_nearest_codes(family: str, tmp_path: Path) -> None:
    skip_windows_of_old(family)
    model, out = ALL_DECODERS[family](), tmp_path / "deployment"
    export_base(model, out)
    with Deployment.open(out) as opened:
        before = opened.run(input_ids=IDS)["logits"]
    manifest = export_kv_cache(out)
    assert manifest.variants["onnxruntime-cpu"].kv_cache_graphs == {"int8": GRAPH}
    with Deployment.open(out, kv_cache_dtype="int8") as opened:
        whole = opened.run(input_ids=IDS)["logits"][0]
        steps, states = stepped(opened)
    assert states.dtype == np.int8
    scales, model = read_scales(out / GRAPH), model.double()
    codes = dict(zip(scales, states, strict=True))
    expected, distance = logits(model, codes, scales)
    effect = np.abs(expected - logits(model)[0]).max()
    assert distance < 0.501
    assert np.abs(whole - expected).max() < effect / 100
    assert np.abs(steps - expected[-len(steps) :]).max() < effect / 100
    with Deployment.open(out, kv_cache_dtype="float32") as opened:
        assert np.array_equal(opened.run(input_ids=IDS)["logits"], before)
    # Planted faults: codes of the wrong tensor, and a scale that is not the graph's.
    swapped = codes | {"past_key_values.1.key": codes["past_key_values.1.value"]}
    assert logits(model, swapped, scales)[1] > 1
    wrong = scales | {"past_key_values.1.value": 1.5 * scales["past_key_values.1.value"]}
    assert logits(model, codes, wrong)[1] > 1


def test_graphs_without_such_a_cache_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    export_base(ALL_DECODERS["llama"](), folder)
    with pytest.raises(BackendError, match=r"only float32: leave it out, or add the graph with 'adalink export kv-"):
        Deployment.open(folder, kv_cache_dtype="int8")
    with Deployment.open(folder) as opened:
        export_kv_cache(folder)
        opened.reload()  # the graph that is open is what it was
    with pytest.raises(DeploymentError, match="has a graph with an int8 KV cache already"):
        export_kv_cache(folder)
    export_base(ALL_DECODERS["llama"](), folder, target="portable")
    with pytest.raises(ConfigError, match="computes attention in standard operators"):
        export_kv_cache(folder, "portable")
    assert read_manifest(folder).variants["onnxruntime-cpu"].kv_cache_graphs == {"int8": GRAPH}
    export_base(bert(), tmp_path / "bert")
    with pytest.raises(ConfigError, match="is encoder in float32"):
        export_kv_cache(tmp_path / "bert")
    with pytest.raises(BackendError, match="is encoder, not a decoder: leave it out"):
        Deployment.open(tmp_path / "bert", kv_cache_dtype="float32")


def test_numbers_without_a_range_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_base(ALL_DECODERS["llama"](), tmp_path)
    states = StaticCacheDecodeState.states
    monkeypatch.setattr(StaticCacheDecodeState, "states", lambda *place: states(*place) * np.float32(np.inf))
    with pytest.raises(GraphError, match=r"no finite numbers, in past_key_values\.0\.key"):
        export_kv_cache(tmp_path)
    assert read_manifest(tmp_path).variants["onnxruntime-cpu"].kv_cache_graphs == {}
