"""A task graph computes the method, for every activation, dtype and number of modalities, and says what it is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.runtime import random_adapter

from adalink.export.adapter.check import check_task_graph
from adalink.export.adapter.nodes import OUTPUT_NAME
from adalink.export.adapter.session import OpenGraph
from adalink.export.adapter.task_graph import build_task_graph
from adalink.runtime.errors import AdapterError, GraphError
from adalink.runtime.storage.adapter import Adapter, make_adapter
from adalink.runtime.storage.adapter_spec import ACTIVATIONS

WIDTH, RANK, ROWS = 48, 5, 40
FINGERPRINT = "sha256:" + "5a" * 32
NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ELEMENT = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TORCH = {
    "identity": lambda h: h,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


def make(
    activation: str = "gelu", bias: bool = True, modalities: tuple[str, ...] = ("text",), seed: int = 3
) -> Adapter:
    settings: dict[str, Any] = {"rank": RANK, "activation": activation, "bias": bias, "modalities": modalities}
    return random_adapter(FINGERPRINT, WIDTH, seed, scope="all", **settings)


def inputs(dtype: str, seed: int = 0) -> np.ndarray:
    """Values exact in ``dtype``, with magnitudes from small to large, shape ``(2, ROWS, WIDTH)``."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(2, ROWS, 1)))
    return (rng.normal(size=(2, ROWS, WIDTH)) * scale).astype(NUMPY[dtype])


def run(model: onnx.ModelProto, x: np.ndarray, dtype: str, modality: np.ndarray | None = None) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding, out = session.io_binding(), np.empty_like(x)
    bits = f"u{x.itemsize}"
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    binding.bind_ortvalue_input("inputs_embeds", value(x.view(bits), ELEMENT[dtype]))
    if modality is not None:
        binding.bind_cpu_input("modality", modality)
    binding.bind_ortvalue_output(OUTPUT_NAME, value(out.view(bits), ELEMENT[dtype]))
    session.run_with_iobinding(binding)
    return out


def exact(adapter: Adapter, modality: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """PyTorch in float64, and the products of absolute values that rounding scales with."""
    weights = {k: torch.tensor(v).double() for k, v in adapter.weights.items() if k.startswith(f"{modality}.")}
    down, up = weights[f"{modality}.down.weight"], weights[f"{modality}.up.weight"]
    zero = torch.zeros(1, dtype=torch.float64)
    bias_down, bias_up = weights.get(f"{modality}.down.bias", zero), weights.get(f"{modality}.up.bias", zero)
    wide = torch.tensor(x.astype(np.float64))
    inner = torch.nn.functional.linear(wide, down) + bias_down
    result = wide + torch.nn.functional.linear(TORCH[adapter.config.activation](inner), up) + bias_up
    spread_in = wide.abs() @ down.abs().T + bias_down.abs() + 1.0
    spread = wide.abs() + spread_in @ up.abs().T + bias_up.abs()
    return result.numpy(), spread.numpy()


def limit(spread: np.ndarray, dtype: str) -> np.ndarray:
    """gamma_n of the longest chain of roundings times what it acts on.

    A result passes through at most WIDTH + 1 roundings in ``down``, 8 of the activation (slope at most 1.13), RANK + 1
    in ``up``, one sum and one cast. Every intermediate is at most ``spread`` (1 covers an activation near zero).
    """
    u = ROUNDOFF["float32"]
    n = 1.13 * (WIDTH + 1 + 8) + RANK + 3
    cast = ROUNDOFF[dtype] if dtype != "float32" else 0.0
    return spread * (n * u / (1 - n * u) + cast * 1.001) + 2.0**-24 * (dtype == "float16")


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_graph_equals_pytorch(activation: str, bias: bool, dtype: str) -> None:
    adapter, x = make(activation, bias), inputs(dtype)
    received = run(build_task_graph(adapter, "topics", dtype), x, dtype).astype(np.float64)
    expected, spread = exact(adapter, "text", x)
    assert received.shape == x.shape
    assert (np.abs(received - expected) <= limit(spread, dtype)).all()
    assert (np.abs(x.astype(np.float64) - expected) > limit(spread, dtype)).mean() > 0.5, "the adapter must show"


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_modalities_go_by_index_and_others_pass_bit_for_bit(activation: str, dtype: str) -> None:
    adapter, x = make(activation, True, ("image", "text")), inputs(dtype)
    x[0, 0, :3] = np.array([-0.0, np.inf, np.nan]).astype(x.dtype)
    modality = np.random.default_rng(1).integers(-1, 2, size=x.shape[:2])
    modality[0, 0], modality[0, 1] = -1, 7
    received = run(build_task_graph(adapter, "both", dtype), x, dtype, modality)
    for index, name in enumerate(("image", "text")):
        here = modality == index
        assert here.sum() > 5
        expected, spread = exact(adapter, name, x[here])
        assert (np.abs(received[here].astype(np.float64) - expected) <= limit(spread, dtype)).all()
        other = exact(adapter, {"image": "text", "text": "image"}[name], x[here])[0]
        assert (np.abs(received[here].astype(np.float64) - other) > limit(spread, dtype)).any()
    untouched = (modality != 0) & (modality != 1)
    bits = f"u{x.itemsize}"
    assert np.array_equal(received.view(bits)[untouched], x.view(bits)[untouched])


def test_one_changed_weight_is_outside_the_limit() -> None:
    """The limit finds the smallest planted fault: the largest weight of ``up`` changed by 1 %."""
    adapter, x = make(), inputs("float32")
    weights = {name: value.copy() for name, value in adapter.weights.items()}
    up = weights["text.up.weight"]
    up.flat[np.abs(up).argmax()] *= np.float32(1.01)
    changed = make_adapter(adapter.config, weights)
    expected, spread = exact(adapter, "text", x)
    received = run(build_task_graph(changed, "topics", "float32"), x, "float32")
    assert (np.abs(received - expected) > limit(spread, "float32")).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("modalities", [("text",), ("image", "text")])
def test_check_passes_the_right_graph_and_finds_a_changed_weight(
    modalities: tuple[str, ...], activation: str, dtype: str
) -> None:
    adapter, x = make(activation, True, modalities), inputs(dtype)[0].astype(np.float32)
    check_task_graph(OpenGraph(build_task_graph(adapter, "t", dtype).SerializeToString(), dtype), adapter, dtype, x)
    weights = {name: value.copy() for name, value in adapter.weights.items()}
    weights["text.up.bias"][0] += np.float32(0.05)
    wrong = build_task_graph(make_adapter(adapter.config, weights), "t", dtype).SerializeToString()
    with pytest.raises(GraphError, match=r"modality 'text': element 0 of row \d+ is .* expected .* within"):
        check_task_graph(OpenGraph(wrong, dtype), adapter, dtype, x)


@pytest.mark.parametrize(("dtype", "scale"), [("float16", 1e5), ("bfloat16", 1e38), ("float32", 1e38)])
def test_an_adapter_whose_values_the_dtype_cannot_hold_is_named_and_not_the_graph(dtype: str, scale: float) -> None:
    adapter = make()
    weights = {**adapter.weights}
    for name, factor in (("down", 1e3), ("up", scale)):
        weights[f"text.{name}.weight"] = weights[f"text.{name}.weight"] * np.float32(factor)
    extreme, x = make_adapter(adapter.config, weights), inputs(dtype)[0].astype(np.float32)
    graph = OpenGraph(build_task_graph(extreme, "t", dtype).SerializeToString(), dtype)
    with pytest.raises(AdapterError, match=rf"up to \d.*e\+\d+, more than {dtype} holds \(\d.* lower rate"):
        check_task_graph(graph, extreme, dtype, x)


def test_check_finds_a_graph_that_adapts_positions_of_no_modality() -> None:
    adapter, x = make("identity", False, ("image", "text")), inputs("float32")[0]
    model = build_task_graph(adapter, "t", "float32")
    index = next(tensor for tensor in model.graph.initializer if tensor.name == "image.index")
    index.CopyFrom(onnx.numpy_helper.from_array(np.array(-1, np.int64), "image.index"))
    with pytest.raises(GraphError, match="without a modality were changed"):
        check_task_graph(OpenGraph(model.SerializeToString(), "float32"), adapter, "float32", x)


def test_metadata_says_what_the_graph_is() -> None:
    adapter = make("silu", True, ("image", "text"))
    model = build_task_graph(adapter, "topics", "float16")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata.pop("kit_version")
    assert metadata == {
        "task": "topics",
        "rank": str(RANK),
        "activation": "silu",
        "scope": "all",
        "modalities": "image,text",
        "base_fingerprint": FINGERPRINT,
        "adapter_digest": adapter.digest,
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_graph_is_standard_small_and_dynamic(activation: str) -> None:
    adapter = make(activation, True, ("image", "text"))
    model = build_task_graph(adapter, "topics", "bfloat16")
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 20)}
    assert {node.domain for node in model.graph.node} == {""}
    for value in (*model.graph.input, *model.graph.output):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims[:2] == ["batch", "sequence"]
    assert model.ByteSize() < adapter.size_bytes + 6000


def test_same_adapter_gives_the_same_bytes() -> None:
    first = build_task_graph(make(), "t", "float32").SerializeToString(deterministic=True)
    assert first == build_task_graph(make(), "t", "float32").SerializeToString(deterministic=True)
    assert first != build_task_graph(make(seed=4), "t", "float32").SerializeToString(deterministic=True)
    assert first != build_task_graph(make(), "u", "float32").SerializeToString(deterministic=True)
