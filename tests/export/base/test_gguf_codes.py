"""Codes of a GGUF file in an engine: bit for bit in every family, said where not, and refused where they cannot be."""

from __future__ import annotations

import gguf
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from helpers.gguf_codes import export_codes, graphs_of, measured
from helpers.quantized_graphs import dequantized, products
from helpers.quick import slow_except
from helpers.tiny_ggufs import wide, write_gguf
from helpers.tiny_models import token_ids

from adalink.export.base.export import export_base
from adalink.export.base.gguf_codes import GgufCodes
from adalink.export.base.quantize import SCHEMES
from adalink.export.base.request import quantized_types
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ConfigError, GraphError
from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES, LEVEL_TYPES
from adalink.runtime.storage.manifest import GgufTensors
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.training.models.loading import load_base

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "t5")


@pytest.mark.parametrize("name", LEVEL_TYPES)
def test_levels_and_scales_are_those_of_the_gguf_package(name):
    """Random bytes, so every code occurs; only the scale is made finite."""
    kind = LEVEL_TYPES[name]
    groups = np.random.default_rng(5).integers(0, 256, (64, BLOCK_TYPES[name].size_bytes), np.uint8)
    place = slice(-2, None) if name == "Q6_K" else slice(2)
    groups[:, place] = np.linspace(-3, 3, 64).astype("<f2")[:, None].view(np.uint8)
    levels, scales = kind.read(groups)
    values = levels.reshape(64, -1, kind.scaled) * scales.reshape(64, -1, 1)
    expected = gguf.quants.dequantize(groups, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(values.reshape(64, -1), expected)


def rows_of(path):
    """All rows of a file's tensors, by the ``gguf`` package; -0 is 0."""
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        yield from (row.tobytes() for row in np.atleast_2d(values) + 0)


@pytest.mark.parametrize("architecture", slow_except(ARCHITECTURES, "llama", "gpt2"))
def test_every_family_keeps_its_codes(tmp_path, architecture):
    path, folder = export_codes(tmp_path, architecture)
    assert measured(path, folder) == dict.fromkeys(("matrices", "gguf", "record"), (0, True))
    rows, bits = set(rows_of(path)), set()
    for graph in graphs_of(folder):
        constants = {tensor.name for tensor in onnx.load(graph).graph.initializer if len(tensor.dims) == 2}
        nodes = onnx.load(graph).graph.node
        assert not [n.name for n in nodes if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]
        for matrix in dequantized(graph).values():
            assert {row.tobytes() for row in matrix.astype(np.float32) + 0} <= rows
        bits |= {attributes["bits"] for _, attributes in products(graph)}
    assert bits == {4, 8}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file with types that are kept, quantised again and left as floats, and the lines of its export."""
    types = {"token_embd": "F16", "blk.1.ffn_down": "Q4_K", "blk.1.attn_output": "Q4_1"}
    folder = tmp_path_factory.mktemp("mixed")
    path, deployment = export_codes(folder, "llama", lambda name: types.get(name.removesuffix(".weight"), "Q4_0"))
    return path, deployment


def test_what_becomes_of_other_types_is_recorded(mixed):
    path, folder = mixed
    quantization = read_manifest(folder).variants["gguf"].quantization
    assert [tuple(getattr(entry, name) for name in GgufTensors.__struct_fields__) for entry in quantization.gguf] == [
        ("F16", 1, 32, 0, True),
        ("Q4_0", 12, 4, 32, True),
        ("Q4_1", 1, 8, 32, False),
        ("Q4_K", 1, 8, 32, False),
    ]
    assert (quantization.bits, quantization.sensitive_bits) == (4, 8)
    found = measured(path, folder)
    assert {name for name, (_, passed) in found.items() if passed} == set(found)
    assert found["gguf"] == (0, True)
    assert 0 < found["weights"][0] <= 1.001  # half steps of 8 bits
    kinds = [node.op_type for node in onnx.load(graphs_of(folder)[0]).graph.node]
    assert kinds.count("MatMul") == 1  # the head
    described = CliRunner().invoke(main, ["inspect", str(folder)])
    assert "Q4_K" in described.output


def test_the_engine_computes_with_the_codes(mixed):
    path, folder = mixed
    ids = token_ids(1, rows=1, columns=9)
    with Deployment.open(folder, threads=1) as deployment, torch.no_grad():
        found = deployment.run(input_ids=ids.numpy())["logits"]
        expected = load_base(path)(input_ids=ids).logits.numpy()
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.04


def test_the_command_says_what_becomes_of_types(tmp_path):
    kind = {"Q4_0": "Q4_0"}
    path = write_gguf(tmp_path / "tiny.gguf", wide("llama"), "llama", kind=lambda name: kind.get(name[-4:], "Q4_1"))
    arguments = ["export", "base", str(path), "--out", str(tmp_path / "d"), "--quantize", "gguf"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "Q4_1: 15 tensors as 8 bits in blocks of 32, quantised again" in result.output


def test_codes_that_are_not_the_graphs_are_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", wide("llama"), "llama", kind=lambda name: "Q4_0")
    matrix = gguf.quants.dequantize(
        *next((t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors if t.shape[0] == 256)
    )
    assert quantized_types(path) == ("Q4_0",)
    codes = GgufCodes(path)
    with pytest.raises(GraphError, match=r"no product has codes of tiny.gguf.*choose int4 or int8"):
        codes.record(SCHEMES["gguf"])
    assert codes.blocks(matrix[::-1], "/down_proj/MatMul").bits == 4
    changed = matrix.copy()
    changed[3, 5] += 1
    with pytest.raises(GraphError, match=r"/down_proj/MatMul: 1 of its matrix's 64 rows are in no tensor of tiny.gguf"):
        codes.blocks(changed, "/down_proj/MatMul")
    with pytest.raises(GraphError, match=r"64 of its matrix's 64 rows"):
        codes.blocks(matrix[:, ::-1].copy(), "/down_proj/MatMul")


def test_what_has_no_codes_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", wide("llama"), "llama")
    assert quantized_types(path) == ()
    with pytest.raises(ConfigError, match=r"the matrices of tiny.gguf are floating point: choose int4 or int8"):
        export_base(path, tmp_path / "d", quantization="gguf")
    with pytest.raises(ConfigError, match=r"a loaded LlamaForCausalLM is none: choose int4 or int8"):
        export_base(load_base(path), tmp_path / "d", quantization="gguf")
    load_base(path).save_pretrained(tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"keeps the codes of a GGUF file, and folder is none"):
        export_base(tmp_path / "folder", tmp_path / "d", quantization="gguf")
