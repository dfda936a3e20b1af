"""`adalink inspect` on adapters and ONNX files; deployments and models are in test_inspect_deployment.py."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from adalink.runtime.storage.adapter import AdapterConfig, encode_adapter, make_adapter
from adalink.tools.cli import main


def inspect_json(target):
    result = CliRunner().invoke(main, ["inspect", str(target), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def adapter_folder(tmp_path):
    rng = np.random.default_rng(5)
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        base_fingerprint="sha256:" + "ab" * 32,
        hidden_size=24,
        rank=3,
        activation="silu",
        bias=True,
        modalities=("text",),
        scope="prompt",
    )
    weights = {
        "text.down.weight": rng.normal(size=(3, 24)).astype(np.float32),
        "text.up.weight": rng.normal(size=(24, 3)).astype(np.float32),
        "text.down.bias": rng.normal(size=3).astype(np.float32),
        "text.up.bias": rng.normal(size=24).astype(np.float32),
    }
    adapter = make_adapter(config, weights)
    for name, data in zip(("adapter_config.json", "adapter_model.safetensors"), encode_adapter(adapter), strict=True):
        (tmp_path / name).write_bytes(data)
    return tmp_path, adapter


def test_adapter(adapter_folder):
    folder, adapter = adapter_folder
    found = inspect_json(folder)
    assert found["kind"] == "adapter"
    assert (found["rank"], found["activation"], found["scope"]) == (3, "silu", "prompt")
    assert found["parameters"] == 3 * 24 * 2 + 3 + 24
    assert found["adapter_digest"] == adapter.digest


def test_table_shows_the_same_facts(adapter_folder):
    folder, adapter = adapter_folder
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 0
    assert adapter.digest in result.stdout


def test_truncated_adapter_exits_2(adapter_folder):
    folder, _ = adapter_folder
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 2
    assert "not a complete safetensors file" in result.stderr


def write_graph(path, inputs, metadata):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Neg", [inputs[0]], ["y"])], "g", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    helper.set_model_props(model, metadata)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("inputs", "metadata", "role"),
    [
        (["inputs_embeds"], {"adapter_digest": "sha256:x", "task": "a"}, "task graph"),
        (["inputs_embeds", "attention_mask"], {}, "base graph"),
        (["x"], {}, "neither a task graph nor a base graph"),
    ],
)
def test_onnx(tmp_path, inputs, metadata, role):
    write_graph(tmp_path / "g.onnx", inputs, metadata)
    found = inspect_json(tmp_path / "g.onnx")
    assert found["role"] == role
    assert found["inputs"] == dict.fromkeys(inputs, "float (batch, 4)")
    assert found["outputs"] == {"y": "float (batch, 4)"}
    assert found["opsets"] == {"ai.onnx": 18}
    assert found["operators"] == {"Neg": 1}
    assert found["metadata"] == metadata


@pytest.mark.parametrize("left", [slice(0, -7), slice(0)])
def test_damaged_onnx_exits_2(tmp_path, left):
    write_graph(tmp_path / "g.onnx", ["x"], {})
    data = (tmp_path / "g.onnx").read_bytes()
    (tmp_path / "g.onnx").write_bytes(data[left])
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "g.onnx")])
    assert result.exit_code == 2
    assert "not a complete ONNX file" in result.stderr
