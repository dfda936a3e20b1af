"""Exports in pieces: the graphs hold what PyTorch's own exporter writes of the whole model, and memory stays small."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from helpers.export import MODELS
from onnx import numpy_helper

from adalink.export.architectures import architecture_of
from adalink.export.base.export import export_base
from adalink.export.base.graphs import traced_graphs
from adalink.export.base.quantize import SCHEMES, quantize
from adalink.export.tracing import graph_weights
from adalink.export.tracing.attention import exportable_attention
from adalink.export.tracing.graph import (
    DOMAIN,
    OPSET,
    TracedGraph,
    _name_attention_shapes,
    quiet_exporter,
    save_graph,
    trace,
)
from adalink.export.tracing.static_shapes import make_reshapes_static
from adalink.runtime.errors import ModelError
from adalink.training.models import weights
from adalink.training.models.stand_ins import StandIns


def exported_whole(graph, path):
    """The graph as PyTorch's exporter writes it with all weights inside."""
    with torch.no_grad(), quiet_exporter():
        torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            str(path),
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            dynamic_axes=graph.axes,
            opset_version=OPSET,
            custom_opsets={DOMAIN: 1} if graph.is_grouped else None,
            dynamo=False,
        )
    model = onnx.load(path)
    _name_attention_shapes(model)
    make_reshapes_static(model)
    return model


def computation(model):
    """Operators in turn with the bytes of their constant inputs, whatever the names."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return sorted(
        (node.op_type, [(constants[name].shape, constants[name].tobytes()) for name in node.input if name in constants])
        for node in model.graph.node
        if node.op_type != "Constant"
    )


@pytest.mark.parametrize(
    ("family", "grouped"),
    [
        ("llama", True),
        ("gpt2", False),
        ("gemma3", True),
        ("bert", False),
        pytest.param("qwen3", True, marks=pytest.mark.slow),
        pytest.param("phi3", False, marks=pytest.mark.slow),
        pytest.param("t5", False, marks=pytest.mark.slow),
    ],
)
def test_graph_is_the_one_of_the_whole_model(tmp_path, monkeypatch, family, grouped):
    for module in (weights, graph_weights):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)  # many pieces, even here
    model = MODELS[family]()
    architecture, stand_ins = architecture_of(model), StandIns()
    skeleton = stand_ins.skeleton(model)
    with exportable_attention(model), exportable_attention(skeleton):
        whole = traced_graphs(model, architecture, grouped=grouped)
        pieces = traced_graphs(skeleton, architecture, grouped=grouped, stand_ins=stand_ins)
        for stem in whole:
            save_graph(trace(pieces[stem], stem, {}), tmp_path / f"{stem}.onnx")
            actual = computation(onnx.load(tmp_path / f"{stem}.onnx"))
            assert actual == computation(exported_whole(whole[stem], tmp_path / f"{stem}-whole.onnx"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_those_of_the_converted_model(tmp_path, dtype):
    model = MODELS["gemma3"]()
    export_base(model, tmp_path, dtype=dtype, target="portable")
    graph = onnx.load(tmp_path / "base/portable/model.onnx").graph
    held = {tensor.raw_data for tensor in graph.initializer}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            turned = parameter.detach().to(getattr(torch, dtype)).t().contiguous()
            assert turned.view(torch.int16).numpy().tobytes() in held, name


def test_codes_do_not_depend_on_the_pieces(tmp_path, monkeypatch):
    model = MODELS["gpt2"]()

    def codes(piece_bytes):
        monkeypatch.setattr(graph_weights, "PIECE_BYTES", piece_bytes)
        with exportable_attention(model):
            graph = trace(traced_graphs(model, architecture_of(model), grouped=False)["model"], "model", {})
        quantize(graph, SCHEMES["int4"], "model")
        path = tmp_path / f"{piece_bytes}.onnx"
        save_graph(graph, path)
        return {tensor.name: tensor.raw_data for tensor in onnx.load(path).graph.initializer}

    assert codes(2000) == codes(1 << 30)


def test_progress_names_matrices(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(graph_weights, "_PROGRESS_SECONDS", 0.0)
    export_base(MODELS["llama"](), tmp_path, quantization="int4", progress=lines.append)
    written = [line for line in lines if line.startswith("writing model.onnx: matrix ")]
    matrices = sum(
        tensor.name.endswith(".codes") for tensor in onnx.load(tmp_path / "base/int4/model.onnx").graph.initializer
    )
    assert written == [f"writing model.onnx: matrix {done} of {matrices + 2}" for done in range(matrices + 2)], (
        "the products, and the rotary tables"
    )


def test_fused_graph_has_no_weight_twice(tmp_path):
    """BERT's fusion joins queries, keys and values: the file shrinks to what the fused graph has."""
    export_base(MODELS["bert"](), tmp_path)
    path = tmp_path / "base/onnxruntime-cpu/model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    places = sorted(
        (int(entries["offset"]), int(entries["length"]))
        for tensor in graph.initializer
        if tensor.data_location == tensor.EXTERNAL
        for entries in [{entry.key: entry.value for entry in tensor.external_data}]
    )
    assert all(start + length <= following for (start, length), (following, _) in itertools.pairwise(places))
    size = (path.parent / "model.onnx.data").stat().st_size
    assert size - sum(length for _, length in places) < 4096 * len(places)
    assert np.prod(graph.initializer[0].dims) > 0


def test_tracing_leaves_dropout_off():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).eval()
    trace(TracedGraph(module, {"x": torch.zeros(2, 4)}, ["y"], {"x": {0: "batch"}}), "x.onnx", {})
    assert not any(part.training for part in module.modules())


def test_files_that_change_meanwhile_are_no_base(tmp_path):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "model")

    def overwrite(line):
        if line.startswith("tracing"):
            (tmp_path / "new").mkdir()
            model.double().save_pretrained(tmp_path / "new")
            (tmp_path / "new" / "model.safetensors").replace(tmp_path / "model" / "model.safetensors")

    with pytest.raises(ModelError, match=r"model\.safetensors changed while it was read"):
        export_base(tmp_path / "model", tmp_path / "out", progress=overwrite)
    assert not (tmp_path / "out" / "manifest.json").exists()
