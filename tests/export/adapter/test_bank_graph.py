"""A bank graph computes every task of its activation key, one task for all rows or one each; a wrong graph is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from helpers.runtime import random_adapter

from adalink.export.adapter.bank_graph import build_bank_graph
from adalink.export.adapter.check import adapt_with_bound, check_in_bank
from adalink.export.adapter.session import OpenGraph
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.adapter_spec import ACTIVATION_KEYS
from adalink.runtime.tasks.adapter_mapping import bank_weights

WIDTH = 48
FINGERPRINT = "sha256:" + "5a" * 32
DTYPES = ("float32", "float16", "bfloat16")


def make(key: str, rank: int = 5, seed: int = 3) -> Adapter:
    activation = key.removesuffix("_bias")
    settings: dict[str, Any] = {"rank": rank, "activation": activation, "bias": key != activation, "scope": "all"}
    return random_adapter(FINGERPRINT, WIDTH, seed, **settings)


def inputs(dtype: str, batch: int) -> np.ndarray:
    """Values exact in ``dtype``, shape ``(batch, 20, WIDTH)``."""
    import ml_dtypes

    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return np.random.default_rng(batch).normal(size=(batch, 20, WIDTH)).astype(numpy_dtype).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", ACTIVATION_KEYS)
def test_each_row_by_its_own_weights(key: str, dtype: str) -> None:
    graph = OpenGraph(build_bank_graph(key, WIDTH, dtype).SerializeToString(), dtype)
    x = inputs(dtype, 3)
    adapters = [make(key, seed=seed) for seed in range(3)]
    own = [bank_weights(adapter, "text") for adapter in adapters]
    stacked = graph.run(x, {name: np.concatenate([weights[name] for weights in own]) for name in own[0]})
    for row, adapter in enumerate(adapters):
        expected, bound = adapt_with_bound(adapter, "text", x[row].astype(np.float64), dtype)
        assert (np.abs(stacked[row] - expected) <= bound).all()
        np.testing.assert_array_equal(graph.run(x, own[row])[row], stacked[row])
        other = adapt_with_bound(adapters[row - 1], "text", x[row].astype(np.float64), dtype)[0]
        assert (np.abs(stacked[row] - other) > bound).any()


@pytest.mark.parametrize("key", ["gelu", "tanh_bias"])
def test_check_passes_the_right_graph_and_finds_another_activation(key: str) -> None:
    x, adapter = inputs("float32", 1)[0], make(key)
    check_in_bank(
        OpenGraph(build_bank_graph(key, WIDTH, "float32").SerializeToString(), "float32"), adapter, "float32", x
    )
    wrong = {"gelu": "gelu_tanh", "tanh_bias": "silu_bias"}[key]
    graph = OpenGraph(build_bank_graph(wrong, WIDTH, "float32").SerializeToString(), "float32")
    with pytest.raises(
        GraphError, match=r"bank graph, modality 'text': element \d+ of row \d+ is .* expected .* within"
    ):
        check_in_bank(graph, adapter, "float32", x)


@pytest.mark.parametrize("key", ACTIVATION_KEYS)
def test_graph_is_standard_small_and_the_same_each_time(key: str) -> None:
    model = build_bank_graph(key, WIDTH, "float16")
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 20)}
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.graph.initializer
    assert [value.name for value in model.graph.output] == ["adapted_embeds"]
    data = model.SerializeToString(deterministic=True)
    assert len(data) < 2000
    assert data == build_bank_graph(key, WIDTH, "float16").SerializeToString(deterministic=True)
    assert {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}["bank"] == key
