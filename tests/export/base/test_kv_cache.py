"""A graph with an int8 KV cache computes what transformers computes with keys and values that are rounded likewise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers.export import ALL_DECODERS, skip_windows_of_old
from helpers.tiny_models import bert, token_ids
from onnx import numpy_helper

from adalink.export.base.export import export_base
from adalink.export.base.kv_cache import export_kv_cache
from adalink.runtime import Deployment
from adalink.runtime.errors import BackendError, ConfigError, DeploymentError
from adalink.runtime.ort.static_cache import StaticCacheEngine
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.rounded_cache import read_scales, rounded_cache

IDS = token_ids(0).numpy()
GRAPH = "base/onnxruntime-cpu/model.kv-int8.onnx"


def logits(model: Any, scales: Any = None) -> np.ndarray:
    """Of transformers in float64; with ``scales`` its keys and values are rounded."""
    with torch.no_grad():
        if scales is None:
            return np.asarray(model(input_ids=torch.from_numpy(IDS)).logits.numpy())
        with rounded_cache(model, scales):
            return np.asarray(model(input_ids=torch.from_numpy(IDS)).logits.numpy())


def stepped(folder: Path) -> np.ndarray:
    """Logits of the first row at each position, token by token, the first half as one piece."""
    with Deployment.open(folder, kv_cache_dtype="int8") as opened:
        engine, half = opened._runner.engine, IDS.shape[1] // 2
        assert isinstance(engine, StaticCacheEngine)
        embeds = opened._runner._table.take(IDS[:1])
        state = engine.open_slots(1, 4)  # grows on the way
        state.begin(None)
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones_like(IDS[:1])}
        state.extend(feeds, 0, half)
        rows = [state.logits[0].copy()]
        for place in range(half, IDS.shape[1]):
            state.step(embeds[:, place : place + 1])
            rows.append(state.logits[0].copy())
        assert state.states(0, 2).dtype == np.int8
    return np.stack(rows)


@pytest.mark.parametrize("family", ALL_DECODERS)
def test_int8_cache_rounds_as_transformers_does(family: str, tmp_path: Path) -> None:
    skip_windows_of_old(family)
    model, out = ALL_DECODERS[family](), tmp_path / "deployment"
    export_base(model, out)
    with Deployment.open(out) as opened:
        before = opened.run(input_ids=IDS)["logits"]
    manifest = export_kv_cache(out)
    assert manifest.variants["onnxruntime-cpu"].kv_cache_graphs == {"int8": GRAPH}
    scales, model = read_scales(out / GRAPH), model.double()
    expected, exact = logits(model, scales), logits(model)
    effect = np.abs(expected - exact).max()
    with Deployment.open(out, kv_cache_dtype="int8") as opened:
        whole = opened.run(input_ids=IDS)["logits"]
    assert np.abs(whole - expected).max() < effect / 20
    steps = stepped(out)
    assert np.abs(steps - expected[0, -len(steps) :]).max() < effect / 20
    with Deployment.open(out, kv_cache_dtype="float32") as opened:
        assert np.array_equal(opened.run(input_ids=IDS)["logits"], before)
    # Planted fault: one scale of the graph is not the one that is read.
    graph = onnx.load(out / GRAPH, load_external_data=False)
    scale = next(t for t in graph.graph.initializer if t.name == "past_key_values.1.value.scale")
    wrong = dict(scales) | {"past_key_values.1.value": 4 * numpy_helper.to_array(scale)}
    assert np.abs(whole - logits(model, wrong)).max() > effect / 4


def test_graphs_without_such_a_cache_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    export_base(ALL_DECODERS["llama"](), folder)
    with pytest.raises(BackendError, match=r"only float32: leave it out, or add the graph with 'adalink export kv-"):
        Deployment.open(folder, kv_cache_dtype="int8")
    export_kv_cache(folder)
    with pytest.raises(DeploymentError, match="has a graph with an int8 KV cache already"):
        export_kv_cache(folder)
    export_base(ALL_DECODERS["llama"](), folder, target="portable")
    with pytest.raises(ConfigError, match="computes attention in standard operators"):
        export_kv_cache(folder, "portable")
    assert read_manifest(folder).variants["onnxruntime-cpu"].kv_cache_graphs == {"int8": GRAPH}
    export_base(bert(), tmp_path / "bert")
    with pytest.raises(ConfigError, match="is encoder in float32"):
        export_kv_cache(tmp_path / "bert")
