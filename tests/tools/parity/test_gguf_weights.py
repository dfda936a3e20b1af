"""Engines that keep the codes of a GGUF file, against the file read anew: each planted fault is found."""

from __future__ import annotations

import shutil

import msgspec
import onnx
import pytest
from helpers.gguf_codes import export_codes, graphs_of, measured
from helpers.quantized_graphs import MATRIX_OPERATOR
from helpers.runtime import reseal
from onnx import numpy_helper

from adalink.runtime.errors import ContractError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.reference.gguf_weights import check_layers
from adalink.tools.parity.suite import VerifyOptions, verify
from adalink.training.models.gguf.weights import GgufWeight
from adalink.training.models.loading import load_base

QUERY_ROWS, HEADS = 64, 4


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return export_codes(tmp_path_factory.mktemp("gguf"), "llama")


@pytest.fixture
def deployment(clean, tmp_path):
    path, original = clean
    return path, shutil.copytree(original, tmp_path / "deployment")


def edit(folder, product, parts, change):
    """Change codes (1) or scales (2) of the first product whose name holds ``product``, with integrity intact."""
    (path,) = graphs_of(folder)
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == MATRIX_OPERATOR and product in node.name)
    for part in parts:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[part])
        values = numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path.write_bytes(model.SerializeToString())
    reseal(folder)


def flip_a_code(codes):
    codes.reshape(-1)[7] ^= 1


def exchange_scales(scales):
    flat = scales.reshape(-1)
    flat[:2] = flat[1::-1].copy()


def leave_rows_as_in_the_file(values):
    """The halves of each head's rows in turn, which transformers undoes."""
    rows = values.reshape(len(values), -1)[:QUERY_ROWS]
    rows[:] = rows.reshape(HEADS, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(
    ("product", "parts", "change", "check"),
    [
        ("o_proj", (1,), flip_a_code, "gguf"),
        ("lm_head", (1,), flip_a_code, "gguf"),
        ("o_proj", (2,), exchange_scales, "gguf"),
        ("lm_head", (2,), exchange_scales, "gguf"),
        ("self_attn", (1, 2), leave_rows_as_in_the_file, "matrices"),
    ],
    ids=["code", "head-code", "scales", "head-scales", "permutation"],
)
def test_weights_that_are_not_the_files(deployment, product, parts, change, check):
    path, folder = deployment
    edit(folder, product, parts, change)
    assert not measured(path, folder)[check][1]


def test_a_permutation_left_out_while_loading(tmp_path, monkeypatch):
    """Then model and engine agree, and both are wrong."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    monkeypatch.setattr(GgufWeight, "_laid_out", lambda self, values: values)
    monkeypatch.setattr(LlamaTensorProcessor, "_reverse_permute_weights", lambda self, weights, *_: weights)
    found = measured(*export_codes(tmp_path, "llama"))
    assert found["matrices"] == (0, True)
    assert found["gguf"][0] > 1000


def test_a_wrong_record(deployment):
    path, folder = deployment
    manifest = read_manifest(folder)
    variant = manifest.variants["gguf"]
    first, *others = variant.quantization.gguf
    wrong = (msgspec.structs.replace(first, bits=6), *others)
    quantization = msgspec.structs.replace(variant.quantization, gguf=wrong)
    reseal(folder, variants={"gguf": msgspec.structs.replace(variant, quantization=quantization)})
    assert not measured(path, folder)["record"][1]


def test_the_whole_of_verify(deployment):
    path, folder = deployment
    options = VerifyOptions(variant="gguf", threads=1, quick=True)
    report = verify(folder, str(path), {}, options)
    assert not [check for check in report.checks if not check.passed]
    assert {"quantization/gguf", "quantization/record", "activations/base/logits"} <= {c.name for c in report.checks}
    assert report.cost["perplexity"]["float32"] == pytest.approx(report.cost["perplexity"]["weights"], rel=1e-9)


def test_a_model_that_is_no_gguf_file(clean, tmp_path):
    path, folder = clean
    load_base(path).save_pretrained(tmp_path / "folder")
    quantization = read_manifest(folder).variants["gguf"].quantization
    with pytest.raises(ContractError, match=r"keeps the codes of a GGUF file, and folder is none: verify it against"):
        check_layers([], [], quantization, tmp_path / "folder")
