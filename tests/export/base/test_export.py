"""What a base export writes and what it keeps."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.export import in_half
from helpers.tiny_models import DECODERS, FAMILIES, HIDDEN_SIZE, LAYERS, MAX_POSITIONS, VOCAB_SIZE, token_ids
from helpers.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer
from onnx import numpy_helper

from adalink.export.base.export import export_base
from adalink.export.tracing.static_shapes import make_reshapes_static
from adalink.runtime.errors import ConfigError, ModelError
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Cache
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.models.loading import base_fingerprint


def graph_of(folder: Path, target: str = "portable") -> onnx.ModelProto:
    return onnx.load(folder / read_manifest(folder).variants[target].graph)


def test_manifest_describes_the_model(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    manifest = export_base(model, tmp_path, tokenizer=make_tokenizer(), target="portable")
    base = manifest.base
    assert (base.architecture, base.kind, base.embedding_dtype) == ("llama", "decoder", "float32")
    assert (base.vocab_size, base.hidden_size, base.max_positions) == (VOCAB_SIZE, HIDDEN_SIZE, MAX_POSITIONS)
    assert base.fingerprint == base_fingerprint(model)
    assert base.cache == Cache(layers=LAYERS, kv_heads=2, head_dim=16)
    assert (base.eos_token_ids, base.pad_token_id, base.bos_token_id) == ((2,), 0, 1)
    assert (tmp_path / base.chat_template).read_text() == CHAT_TEMPLATE
    assert manifest == read_manifest(tmp_path)
    verify_files(tmp_path, manifest)
    on_disk = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, "manifest.json", ".lock"}


def test_special_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.generation_config.eos_token_id = [5, 7, 5, VOCAB_SIZE + 3]
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    base = export_base(model, tmp_path).base
    assert base.eos_token_ids == (5, 7)
    assert base.pad_token_id == 5


def test_the_token_that_ends_completions_ends_a_generation(tmp_path: Path) -> None:
    model, tokenizer = FAMILIES["llama"](), make_tokenizer()
    assert tokenizer.eos_token_id == 2
    for number, (own, ends) in enumerate([(1, (1, 2)), ([5, 2, 7], (5, 2, 7)), (None, (2,))]):
        model.generation_config.eos_token_id = model.config.eos_token_id = own
        assert export_base(model, tmp_path / str(number), tokenizer=tokenizer).base.eos_token_ids == ends
    tokenizer.add_special_tokens({"eos_token": "<far>"})
    assert tokenizer.eos_token_id >= VOCAB_SIZE
    assert export_base(model, tmp_path / "far", tokenizer=tokenizer).base.eos_token_ids == ()


def test_encoder_decoder_says_how_to_begin(tmp_path: Path) -> None:
    base = export_base(FAMILIES["t5"](), tmp_path).base
    assert (base.kind, base.decoder_start_token_id, base.max_positions) == ("encoder-decoder", 0, None)
    assert base.cache == Cache(layers=LAYERS, kv_heads=4, head_dim=12)


def test_a_decoder_must_know_how_it_begins(tmp_path: Path) -> None:
    model = FAMILIES["t5"]()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.bos_token_id = None, 7
    assert export_base(copy.deepcopy(model), tmp_path / "bos").base.decoder_start_token_id == 7
    for config in (model.config, model.generation_config):
        config.bos_token_id = None
    with pytest.raises(ModelError, match="neither decoder_start_token_id nor bos_token_id"):
        export_base(model, tmp_path / "none")


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3", "bert"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_table_is_what_the_embedding_module_returns(family: str, dtype: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    manifest = export_base(model, tmp_path, dtype=dtype, target="portable")
    rows = open_table(tmp_path / manifest.base.embeddings, manifest.base).block(0, VOCAB_SIZE)
    narrow = copy.deepcopy(model).to(getattr(torch, dtype))
    table = narrow.get_input_embeddings()(torch.arange(VOCAB_SIZE)).detach()
    assert rows.tobytes() == table.view(torch.uint8).numpy().tobytes()
    assert manifest.base.fingerprint == base_fingerprint(model), "the fingerprint is that of the float32 model"
    weight = narrow.get_input_embeddings().weight
    assert torch.equal(table, weight) == (not family.startswith("gemma")), "gemma scales its embeddings"


@pytest.mark.parametrize("family", FAMILIES)
def test_portable_graph_is_standard_and_holds_each_weight_once(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    manifest = export_base(model, tmp_path, target="portable")
    table = model.get_input_embeddings().weight.numel()
    tied = getattr(model.config, "tie_word_embeddings", False) and manifest.base.kind != "encoder"
    # Behind `inputs_embeds` no table is needed, except as the output head that is tied to it.
    needed = sum(p.numel() for p in model.parameters()) - (0 if tied else table)
    if family == "bert":
        needed -= sum(p.numel() for p in model.pooler.parameters())
    variant, stored = manifest.variants["portable"], 0
    for path in filter(None, (variant.graph, variant.decoder_graph)):
        graph = onnx.load(tmp_path / path)
        assert {(entry.domain, entry.version) for entry in graph.opset_import} == {("", 20)}
        assert {node.domain for node in graph.graph.node} == {""}
        onnx.checker.check_model(str(tmp_path / path), full_check=True)
        stored += sum(np.prod(t.dims) for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert stored <= 1.01 * needed
    assert stored >= 0.98 * needed


def test_metadata_names_the_base(tmp_path: Path) -> None:
    for target in ("portable", "onnxruntime-cpu"):
        manifest = export_base(FAMILIES["llama"](), tmp_path, target=target)
        metadata = {entry.key: entry.value for entry in graph_of(tmp_path, target).metadata_props}
        assert metadata["base_fingerprint"] == manifest.base.fingerprint


def test_loaded_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        before = model(input_ids=token_ids(0)).logits
    export_base(model, tmp_path, dtype="float16")
    with torch.no_grad():
        assert torch.equal(model(input_ids=token_ids(0)).logits, before)
    assert model.config._attn_implementation != "adalink_export"


@pytest.mark.parametrize("family", DECODERS)
def test_half_precision_graph_follows_the_float32_model(family: str, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider computes in float32 what is stored in float16: only rounding of values shows."""
    model = DECODERS[family]()
    manifest = export_base(model, tmp_path, dtype="float16", target="portable")
    path = tmp_path / manifest.variants["portable"].graph
    stored = path.with_name("model.onnx.data").stat().st_size
    assert stored < 2.1 * sum(parameter.numel() for parameter in model.parameters())
    session, cache = ort.InferenceSession(str(path)), manifest.base.cache
    rounded = in_half(model)
    ids, mask, positions = token_ids(1, 2, 9), np.ones((2, 9), np.int64), np.tile(np.arange(9), (2, 1))
    mask[1, :4], positions[1] = 0, np.maximum(np.arange(9) - 4, 0)
    with torch.no_grad():
        expected = [rounded(input_ids=ids[:1]).logits.numpy()[0], rounded(input_ids=ids[1:, 4:]).logits.numpy()[0]]
        embeds = rounded.get_input_embeddings()(ids).numpy().astype(np.float16)
    past = {
        f"past_key_values.{i}.{part}": np.zeros((2, cache.kv_heads, 0, cache.head_dim), np.float16)
        for i, part in itertools.product(range(LAYERS), ("key", "value"))
    }
    feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    received = session.run(["logits"], feeds | past)[0]
    assert received.dtype == np.float16
    assert np.isfinite(received).all()
    # Outputs, cache and some inner values are rounded to 11 bits, a few dozen times along the way.
    for row, start in ((0, 0), (1, 4)):
        limit = 32 * 2.0**-11 * np.abs(expected[row]).max()
        assert np.abs(received[row, start:] - expected[row]).max() <= limit
    positions[1, -1] += 1
    wrong = session.run(["logits"], feeds | past)[0]
    assert not np.array_equal(wrong[1, -1], received[1, -1])


def test_half_precision_does_not_turn_far_positions(tmp_path: Path) -> None:
    """Rotary frequencies in 11 bits would be wrong by a radian between positions that are this far apart."""
    model = DECODERS["llama"]()
    model.config.max_position_embeddings = 8192
    for target in ("onnxruntime-cpu", "portable"):
        export_base(copy.deepcopy(model), tmp_path, dtype="float16", target=target)
    graph = graph_of(tmp_path, "onnxruntime-cpu").graph
    tables = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in graph.initializer}
    angles = np.arange(8192)[:, None] * model.base_model.rotary_emb.inv_freq.double().numpy()
    assert np.abs(tables["cos_all"] - np.cos(angles)).max() < 2**-10
    assert np.abs(tables["sin_all"] - np.sin(angles)).max() < 2**-10
    manifest = read_manifest(tmp_path)
    rounded, ids, cache = in_half(model), token_ids(1, 1, 8), manifest.base.cache
    assert cache is not None
    positions = np.array([[0, 1, 2, 3, 6000, 6001, 7000, 8000]])
    with torch.no_grad():
        expected = rounded(input_ids=ids, position_ids=torch.from_numpy(positions)).logits.numpy()
        embeds = rounded.get_input_embeddings()(ids).numpy().astype(np.float16)
        for module in (wrong := copy.deepcopy(rounded)).modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq.half().float()
        turned = wrong(input_ids=ids, position_ids=torch.from_numpy(positions)).logits.numpy()
    past = {name: np.zeros((1, cache.kv_heads, 0, cache.head_dim), np.float16) for name, _ in cache.names()}
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, 8), np.int64), "position_ids": positions}
    session = ort.InferenceSession(str(tmp_path / manifest.variants["portable"].graph))
    received = session.run(["logits"], feeds | past)[0]
    limit = 32 * 2.0**-11 * np.abs(expected).max()
    assert np.abs(received - expected).max() <= limit < np.abs(turned - expected).max()


def test_bfloat16_is_written_for_others_and_refused_for_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot run bfloat16"):
        export_base(FAMILIES["llama"](), tmp_path / "cpu", dtype="bfloat16")
    export_base(FAMILIES["llama"](), tmp_path, dtype="bfloat16", target="portable")
    graph = graph_of(tmp_path).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types["inputs_embeds"] == types["logits"] == types["present.0.key"] == onnx.TensorProto.BFLOAT16


def test_cuda_target_without_cuda_keeps_the_portable_graph_and_says_so(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    lines: list[str] = []
    manifest = export_base(FAMILIES["llama"](), tmp_path, target="onnxruntime-cuda", progress=lines.append)
    assert manifest.variants["onnxruntime-cuda"].backends == ("onnxruntime-cuda",)
    assert any("kept in standard operators" in line and "CUDA" in line for line in lines)
    assert {node.domain for node in graph_of(tmp_path, "onnxruntime-cuda").graph.node} == {""}


def test_checkpoint_folder_exports_with_its_tokenizer_or_without(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "bare")
    assert export_base(tmp_path / "bare", tmp_path / "out").base.tokenizer is None
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    manifest = export_base(tmp_path / "full", tmp_path / "out2")
    from tokenizers import Tokenizer

    shipped = Tokenizer.from_file(str(tmp_path / "out2" / manifest.base.tokenizer))
    assert len(shipped.encode("six or seven").ids) == len("six or seven"), "no truncation, no padding"
    assert manifest.base.name == "full"
    assert (tmp_path / "out2" / manifest.base.chat_template).read_text() == CHAT_TEMPLATE


def test_static_reshapes_change_no_output(tmp_path: Path) -> None:
    """The pass on a graph made for it: a reshape it can prove, one it cannot, a size computed from a static one."""
    from onnx import TensorProto, helper

    def constant(name: str, values: Any) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.array(values, np.int64), name)

    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        *(helper.make_node("Gather", ["shape", f"at{i}"], [f"dim{i}"]) for i in range(3)),
        *(helper.make_node("Unsqueeze", [f"dim{i}", "axis"], [f"size{i}"]) for i in range(3)),
        helper.make_node("Concat", ["size0", "size1", "free", "four"], ["heads_shape"], axis=0),
        helper.make_node("Reshape", ["x", "heads_shape"], ["heads"]),
        helper.make_node("Div", ["dim2", "two"], ["half"]),
        helper.make_node("Unsqueeze", ["half", "axis"], ["half_size"]),
        helper.make_node("Slice", ["x", "zero", "half_size", "last"], ["left"]),
        helper.make_node("Concat", ["size1", "size0", "free"], ["swapped_shape"], axis=0),
        helper.make_node("Reshape", ["x", "swapped_shape"], ["swapped"]),
    ]
    initializers = [
        *(constant(f"at{i}", i) for i in range(3)),
        constant("axis", [0]), constant("free", [-1]), constant("four", [4]), constant("two", 2),
        constant("zero", [0]), constant("last", [-1]),
    ]  # fmt: skip
    shapes = {"heads": ["a", "b", 3, 4], "left": ["a", "b", 6], "swapped": ["b", "a", 12]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", 12])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(dims)) for name, dims in shapes.items()],
        initializer=initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    before = ort.InferenceSession(model.SerializeToString())
    assert make_reshapes_static(model) > 0
    after = ort.InferenceSession(model.SerializeToString())
    left = [node.op_type for node in model.graph.node]
    assert left.count("Div") == 0
    reshapes = {node.output[0]: node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    targets = {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    assert targets[reshapes["heads"]] == [0, 0, -1, 4]
    assert reshapes["swapped"] == "swapped_shape", "swapped dimensions are not those of the input: left as it was"
    for sizes in ((1, 1), (2, 5), (7, 3)):
        x = np.random.default_rng(0).normal(size=(*sizes, 12)).astype(np.float32)
        for was, is_now in zip(before.run(None, {"x": x}), after.run(None, {"x": x}), strict=True):
            assert np.array_equal(was, is_now)


def test_traced_decoder_has_few_computed_shapes(tmp_path: Path) -> None:
    export_base(FAMILIES["llama"](), tmp_path, target="portable")
    nodes = graph_of(tmp_path).graph.node
    computed = {node.output[0] for node in nodes if node.op_type == "Concat"}
    dynamic = [node for node in nodes if node.op_type == "Reshape" and node.input[1] in computed]
    assert len(dynamic) <= LAYERS
