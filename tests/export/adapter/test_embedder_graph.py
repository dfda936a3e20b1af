"""An embedder computes every task of its activation, each row by its own; what it must leave alone stays as it is."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.runtime import random_adapter
from helpers.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, token_ids

from adalink.export.adapter.check import adapt_with_bound
from adalink.export.adapter.embedder_graph import EMBEDDERS, build_embedder_graph
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.adapter_spec import ACTIVATION_KEYS, ACTIVATIONS
from adalink.runtime.storage.manifest import Base

WIDTH, RANK = HIDDEN_SIZE, 7
FINGERPRINT = "sha256:" + "5a" * 32
Array = np.ndarray[Any, Any]

BASE = Base(
    name="tiny",
    architecture="bert",
    kind="encoder",
    fingerprint=FINGERPRINT,
    vocab_size=VOCAB_SIZE,
    hidden_size=WIDTH,
    embedding_dtype="float32",
    modalities=("text",),
    max_positions=64,
    cache=None,
    eos_token_ids=(2,),
    pad_token_id=0,
    embeddings="base/embeddings.safetensors",
    tokenizer=None,
    bank=dict.fromkeys(ACTIVATION_KEYS, "base/bank/any.onnx"),
)
TORCH = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "tanh": torch.tanh,
}


def open_front(embedder: str, dtype: str) -> ort.InferenceSession:
    base = msgspec.structs.replace(BASE, embedding_dtype=dtype)
    return ort.InferenceSession(build_embedder_graph(embedder, base).SerializeToString())


def make(activation: str, rank: int, seed: int, bias: bool) -> Adapter:
    settings: dict[str, Any] = {"rank": rank, "activation": activation, "bias": bias, "scope": "all"}
    return random_adapter(FINGERPRINT, WIDTH, seed, **settings)


def tasks_of(activation: str) -> list[Adapter]:
    """Three tasks of other ranks, one without a bias."""
    return [make(activation, 3, 1, True), make(activation, RANK, 2, False), make(activation, 5, 3, True)]


def slots(adapters: list[Adapter]) -> dict[str, Array]:
    """Weights as an embedder takes them: slot 0 holds what must never be used, smaller ranks are filled with zeros."""
    count = len(adapters) + 1
    weights = {
        "down": np.zeros((count, RANK, WIDTH), np.float32),
        "up": np.zeros((count, WIDTH, RANK), np.float32),
        "down_bias": np.zeros((count, 1, RANK), np.float32),
        "up_bias": np.zeros((count, 1, WIDTH), np.float32),
    }
    for value in weights.values():
        value[0] = np.nan
    for slot, adapter in enumerate(adapters, 1):
        rank = adapter.config.rank
        weights["down"][slot, :rank] = adapter.weights["text.down.weight"]
        weights["up"][slot, :, :rank] = adapter.weights["text.up.weight"]
        if adapter.config.bias:
            weights["down_bias"][slot, 0, :rank] = adapter.weights["text.down.bias"]
            weights["up_bias"][slot, 0] = adapter.weights["text.up.bias"]
    return weights


def table(dtype: str) -> Array:
    """A table with exact zeros of both signs and denormal numbers among its values."""
    values = np.random.default_rng(6).normal(size=(VOCAB_SIZE, WIDTH)).astype(dtype)
    values[3:, 0] = -0.0
    values[3:, 1] = 0.0
    values[3:, 2] = np.finfo(dtype).smallest_subnormal
    return values


def bits(values: Array) -> Array:
    return values.view(f"u{values.dtype.itemsize}")


def run(embedder: str, dtype: str, task_index: list[int], is_adapted: Array | None = None) -> tuple[Array, Array]:
    """What went in and what came out, shape ``(4, 7, WIDTH)``, with one row for each of ``task_index``."""
    activation, _, source = embedder.partition(".")
    ids = token_ids(2, len(task_index), 7).numpy()
    rows = table(dtype)[ids]
    feeds: dict[str, Array] = slots(tasks_of(activation)) | {"task_index": np.array(task_index, np.int64)}
    if source == "ids":
        feeds |= {"input_ids": ids, "table": table(dtype)}
    else:
        adapted = np.ones(ids.shape, bool) if is_adapted is None else is_adapted
        feeds |= {"inputs_embeds": rows, "is_adapted": adapted}
    (result,) = open_front(embedder, dtype).run(["adapted_embeds"], feeds)
    assert (result.shape, result.dtype) == (rows.shape, rows.dtype)
    return rows, result


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_each_row_by_its_own_task(embedder: str, dtype: str) -> None:
    activation = embedder.partition(".")[0]
    rows, result = run(embedder, dtype, [2, 0, 3, 1])
    np.testing.assert_array_equal(bits(result[1]), bits(rows[1]))
    for row, slot in ((0, 2), (2, 3), (3, 1)):
        x, adapters = rows[row].astype(np.float64), tasks_of(activation)
        expected, bound = adapt_with_bound(adapters[slot - 1], "text", x, dtype)
        assert (np.abs(result[row] - expected) <= bound).all()
        other = adapt_with_bound(adapters[slot % 3], "text", x, dtype)[0]
        assert (np.abs(result[row] - other) > bound).any(), "another task must be seen"
        wrong = ACTIVATIONS[(ACTIVATIONS.index(activation) + 1) % len(ACTIVATIONS)]
        config = msgspec.structs.replace(adapters[slot - 1].config, activation=wrong)
        changed = Adapter(config, adapters[slot - 1].weights, "")
        assert (np.abs(result[row] - adapt_with_bound(changed, "text", x, dtype)[0]) > bound).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_pytorch(activation: str) -> None:
    rows, result = run(f"{activation}.ids", "float32", [1, 2, 3])
    for row, adapter in enumerate(tasks_of(activation)):
        x = torch.tensor(rows[row])
        weights = {name.removeprefix("text."): torch.tensor(value) for name, value in adapter.weights.items()}
        hidden = torch.nn.functional.linear(x, weights["down.weight"], weights.get("down.bias"))
        up = torch.nn.functional.linear(TORCH[activation](hidden), weights["up.weight"], weights.get("up.bias"))
        np.testing.assert_allclose(result[row], x + up, rtol=1e-5, atol=1e-5)
        assert np.abs(result[row] - rows[row]).max() > 0.1, "the task must change its rows"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_positions_that_are_not_adapted_pass_bit_for_bit(dtype: str) -> None:
    adapted = np.random.default_rng(4).random((4, 7)) < 0.5
    adapted[0] = True
    rows, result = run("gelu.embeds", dtype, [2, 0, 3, 1], adapted)
    _, everywhere = run("gelu.embeds", dtype, [2, 0, 3, 1])
    np.testing.assert_array_equal(bits(result[~adapted]), bits(rows[~adapted]))
    np.testing.assert_array_equal(bits(result[adapted]), bits(everywhere[adapted]))
    assert np.signbit(result[1, :, 0]).all(), "-0.0 of the plain row stays -0.0"
    assert (result[0] != rows[0]).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_graph_is_standard_small_and_the_same_each_time(embedder: str, dtype: str) -> None:
    base = msgspec.structs.replace(BASE, embedding_dtype=dtype)
    model = build_embedder_graph(embedder, base)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 20)}
    assert len(model.SerializeToString()) < 4000
    assert model.SerializeToString(deterministic=True) == build_embedder_graph(embedder, base).SerializeToString(
        deterministic=True
    )
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    edge = {"float32": 1, "float16": 10, "bfloat16": 16}[dtype]
    own = ["table"] if embedder.endswith(".ids") else ["inputs_embeds"]
    assert {kinds[name] for name in ("adapted_embeds", *own)} == {edge}
    assert {kinds[name] for name in ("down", "up", "down_bias", "up_bias")} == {onnx.TensorProto.FLOAT}
    assert kinds["task_index"] == onnx.TensorProto.INT64


def test_a_residual_instead_of_a_choice_would_be_seen() -> None:
    """The fault that the choice exists against: ``x + 0 * delta`` turns -0.0 into 0.0, and NaN of slot 0 into more."""
    rows = table("float32")[token_ids(2, 1, 7).numpy()]
    assert (bits(rows + np.float32(0)) != bits(rows)).any()
