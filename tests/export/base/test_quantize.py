"""Quantised bases: the file format against numpy, the engine against PyTorch with dequantised weights, and refusals."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.quantized_graphs import MATRIX_OPERATOR, dequantized, products
from helpers.tiny_models import FAMILIES, token_ids
from helpers.tiny_tokenizer import make_tokenizer
from onnx import TensorProto, helper, numpy_helper

from adalink.export.base.export import export_base
from adalink.export.base.quantize import SCHEMES, quantize
from adalink.export.tracing.graph_weights import GraphWeight, WeightedGraph, placeholder
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import BackendError, ConfigError, DeploymentError, GraphError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.models.weights import TensorWeight

ROWS, COLUMNS = 80, 24


def weighted_graph(nodes, constants, inputs=("x",), output_width=COLUMNS):
    """A graph whose matrices are not in it yet."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", ROWS]) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", output_width])],
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items() if value.ndim == 1],
    )
    weights = {
        name: GraphWeight(TensorWeight(torch.from_numpy(value)), torch.float32)
        for name, value in constants.items()
        if value.ndim > 1
    }
    graph.initializer.extend(placeholder(name, weight) for name, weight in weights.items())
    return WeightedGraph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), weights)


def quantized(tmp_path, nodes, constants, scheme="int4"):
    graph, path = weighted_graph(nodes, constants), tmp_path / "model.onnx"
    quantize(graph, SCHEMES[scheme], path.name)
    graph.save(path)
    return path


def run(path, **feeds):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.fixture
def matrix():
    return np.random.default_rng(3).normal(size=(ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize(("scheme", "steps"), [("int4", 15), ("int8", 255)])
def test_every_weight_is_within_half_a_step(tmp_path, matrix, scheme, steps):
    path = quantized(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"], name="/h.0/mlp/c_fc/MatMul")], {"w": matrix}, scheme
    )
    ((node, values),) = dequantized(path).items()
    block = SCHEMES[scheme].block_size
    assert values.shape == (COLUMNS, ROWS)  # 80 rows: the last block is half empty
    for start in range(0, ROWS, block):
        part = matrix.T[:, start : start + block]
        step = (np.maximum(part.max(axis=1), 0) - np.minimum(part.min(axis=1), 0)) / steps
        error = np.abs(values[:, start : start + block] - part)
        # The zero point is rounded as well: up to half a step more, at the end of the range.
        assert (error <= step[:, None] * 1.001).all()
        assert np.median(error / step[:, None]) <= 0.5
    assert node == "/h.0/mlp/c_fc/MatMul"


def test_only_what_enters_a_feed_forward_block_has_few_bits(tmp_path, matrix):
    names = {
        "/model/layers.0/self_attn/v_proj/MatMul": 8,
        "/model/layers.0/self_attn/o_proj/MatMul": 8,
        "/model/layers.0/mlp/up_proj/MatMul": 4,
        "/model/layers.0/mlp/down_proj/MatMul": 8,
        "/model/h.0/mlp/c_proj/Gemm": 8,
        "/model/h.0/attn/c_proj/Gemm": 8,
        "/model/h.0/mlp/c_fc/Gemm": 4,
        "/model/layer.0/attention/output/dense/MatMul": 8,
        "/model/layer.0/intermediate/dense/MatMul": 4,
        "/encoder/block.0/layer.1/DenseReluDense/wi_1/MatMul": 4,
        "/some/other/MatMul": 8,
        "/model/layer.0/output/dense/MatMul": 8,
        "/lm_head/MatMul": 8,
    }
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"], name=name) for i, name in enumerate(names)]
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(len(names))], ["y"]))
    path = quantized(tmp_path, nodes, {"w": matrix})
    assert {node.name: attributes["bits"] for node, attributes in products(path)} == names


def test_layers_at_both_ends_have_more_bits(tmp_path, matrix):
    names = [f"/model/layers.{layer}/mlp/gate_proj/MatMul" for layer in range(30)]
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"], name=name) for i, name in enumerate(names)]
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(30)], ["y"]))
    path = quantized(tmp_path, nodes, {"w": matrix})
    assert [attributes["bits"] for _, attributes in products(path)] == [8] * 2 + [4] * 26 + [8] * 2


def test_one_constant_is_stored_once_for_each_precision(tmp_path, matrix):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="/layers.0/up_proj/MatMul"),
        helper.make_node("MatMul", ["x", "w"], ["b"], name="/layers.1/up_proj/MatMul"),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    path = quantized(tmp_path, nodes, {"w": matrix})
    assert len({node.input[1] for node, _ in products(path)}) == 1
    assert len(onnx.load(path, load_external_data=False).graph.initializer) == 3


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_keeps_its_bias(tmp_path, matrix, transposed):
    bias = np.linspace(-3, 5, COLUMNS).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="/h.0/c_fc/Gemm", transB=int(transposed))
    stored = np.ascontiguousarray(matrix.T) if transposed else matrix
    path = quantized(tmp_path, [node], {"w": stored, "b": bias})
    x = np.eye(ROWS, dtype=np.float32)  # rounded to 8 bits without loss
    ((_, values),) = dequantized(path).items()
    np.testing.assert_allclose(run(path, x=x), values.T + bias, rtol=1e-5, atol=1e-5)


def test_what_is_no_product_with_a_constant_stays(tmp_path, matrix):
    square = np.random.default_rng(4).normal(size=(ROWS, ROWS)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "s"], ["t"], name="scaled", alpha=0.5),
        helper.make_node("MatMul", ["t", "w"], ["y"], name="/a/o_proj/MatMul"),
    ]
    path = quantized(tmp_path, nodes, {"s": square, "w": matrix})
    kinds = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert kinds == ["Gemm", MATRIX_OPERATOR]


def test_a_graph_without_matrices_is_refused():
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph = weighted_graph(nodes, {}, output_width=ROWS)
    with pytest.raises(GraphError, match=r"model.onnx multiplies with no constant float32 matrix.*without --quantize"):
        quantize(graph, SCHEMES["int4"], "model.onnx")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "phi3", "bert", "t5"])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_every_linear_layer_of_a_family_is_quantised(tmp_path, family, scheme):
    """No constant matrix is left in float32, and the outputs stay near PyTorch's."""
    model = FAMILIES[family]()
    manifest = export_base(model, tmp_path / "d", tokenizer=make_tokenizer(), quantization=scheme)
    variant = manifest.variants[scheme]
    for path in filter(None, (variant.graph, variant.decoder_graph)):
        graph = onnx.load(tmp_path / "d" / path).graph
        constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
        assert not [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]
        assert any(node.op_type == MATRIX_OPERATOR for node in graph.node)
    ids = token_ids(1, rows=1, columns=9)
    decoder = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    with Deployment.open(tmp_path / "d", threads=1) as deployment, torch.no_grad():
        found = deployment.run(input_ids=ids.numpy(), **{key: value.numpy() for key, value in decoder.items()})
        expected = model(input_ids=ids, **decoder)
    name = "last_hidden_state" if family == "bert" else "logits"
    reference = getattr(expected, name).numpy()
    relative = np.linalg.norm(found[name] - reference) / np.linalg.norm(reference)
    assert 0 < relative < (0.3 if scheme == "int4" else 0.06)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A deployment with the plain and the quantised variant side by side."""
    folder = tmp_path_factory.mktemp("both") / "d"
    for scheme in (None, "int4", "int8"):
        export_base(FAMILIES["llama"](), folder, tokenizer=make_tokenizer(), quantization=scheme)
    return folder


def test_variants_live_side_by_side(both):
    manifest = read_manifest(both)
    assert {name: v.quantization and v.quantization.bits for name, v in manifest.variants.items()} == {
        "onnxruntime-cpu": None,
        "int4": 4,
        "int8": 8,
    }
    assert manifest.variants["int4"].quantization == SCHEMES["int4"]


def test_the_choice_of_a_variant(both):
    ids = [[5, 6, 7, 8]]

    def logits(name):
        with Deployment.open(both, variant=name, threads=1) as deployment:
            return deployment.run(input_ids=ids)["logits"]

    plain = logits("onnxruntime-cpu")
    np.testing.assert_array_equal(logits(None), plain)  # never a quantised one by accident
    fine, coarse = (np.abs(logits(name) - plain).max() for name in ("int8", "int4"))
    assert 0 < fine < coarse
    with pytest.raises(BackendError, match="no base variant 'int3', only int4, int8, onnxruntime-cpu"):
        logits("int3")


def test_adding_a_variant_leaves_the_rest_as_it_is(tmp_path):
    model = FAMILIES["llama"]()
    before = export_base(model, tmp_path / "d", tokenizer=make_tokenizer())
    after = export_base(model, tmp_path / "d", tokenizer=make_tokenizer(), quantization="int4")
    assert after.base == before.base
    assert all(after.files[path] == record for path, record in before.files.items())
    with pytest.raises(DeploymentError, match="already has a base variant 'int4': pass --replace"):
        export_base(model, tmp_path / "d", tokenizer=make_tokenizer(), quantization="int4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int3"}, "quantization is 'int3', expected one of int4, int8"),
        ({"quantization": "int4", "target": "portable"}, "target 'portable' cannot be quantised.*onnxruntime-cpu"),
        ({"quantization": "int8", "dtype": "float16"}, "'int8' is for dtype float32, not float16.*leave --dtype out"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        export_base(Path("nowhere"), tmp_path / "d", **settings)
    assert not (tmp_path / "d").exists()
