"""Graphs with grouped attention compute what their PyTorch model computes, with the cache written in place."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.export import (
    ALL_DECODERS,
    LENGTH,
    SHORT,
    Array,
    Exported,
    difference,
    in_half,
    narrow_llama,
    open_exported,
    skip_windows_of_old,
    yardstick,
)
from helpers.tiny_models import LAYERS, token_ids

from adalink.export.base.export import export_base
from adalink.export.base.grouped_attention import WINDOWS_SINCE, why_not_grouped
from adalink.export.base.merged_linear import MergedLinear, find_groups, merged
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import BackendError
from adalink.runtime.ort.session import is_older
from adalink.runtime.storage.manifest_io import read_manifest

CAPACITY = LENGTH + 3
NAMES = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


@pytest.fixture(scope="module", params=ALL_DECODERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    skip_windows_of_old(request.param)
    model, out = ALL_DECODERS[request.param](), tmp_path_factory.mktemp(request.param)
    return open_exported(model, export_base(model, out), out, "onnxruntime-cpu")


class InPlace:
    """The graph on one cache, past and present at one address. Unwritten places hold NaN, so reading one shows."""

    def __init__(self, exported: Exported, batch: int, dtype: Any = np.float32) -> None:
        base = exported.manifest.base
        self.session = exported.graph
        self.dtype = dtype
        self.vocab_size = base.vocab_size
        shape = (batch, base.cache.kv_heads, CAPACITY, base.cache.head_dim)
        self.cache = {name: np.full(shape, np.nan, dtype) for name in NAMES}

    def run(self, embeds: Array, lengths: list[int], logits_at: list[int]) -> Array:
        """Logits at the places, shape ``(places, vocab)``."""
        sequence = embeds.shape[1]
        begin = np.zeros(len(lengths), np.int64) if sequence == max(lengths) else np.array(lengths) - sequence
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds.astype(self.dtype)),
            "sequence_lengths": np.array(lengths, np.int32),
            "logits_at": np.array(logits_at),
            "position_ids": begin[:, None] + np.arange(sequence),
        }
        binding = self.session.io_binding()
        for node in self.session.get_inputs():
            if node.name in feeds:
                binding.bind_ortvalue_input(node.name, ort.OrtValue.ortvalue_from_numpy(feeds[node.name]))
        for name, values in self.cache.items():
            shared = ort.OrtValue.ortvalue_from_numpy(values)
            binding.bind_ortvalue_input(f"past_key_values.{name}", shared)
            binding.bind_ortvalue_output(f"present.{name}", shared)
        logits = np.empty((len(logits_at), self.vocab_size), self.dtype)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self.session.run_with_iobinding(binding)
        return logits


def places(lengths: list[int]) -> list[int]:
    """Places of the tokens of right-padded rows."""
    longest = max(lengths)
    return [row * longest + at for row, length in enumerate(lengths) for at in range(length)]


def test_right_padded_prompt_equals_each_row_alone(exported: Exported) -> None:
    ids, lengths = token_ids(0, 2, LENGTH), [LENGTH, SHORT]
    logits = InPlace(exported, 2).run(exported.embed(ids), lengths, places(lengths))
    for row, (begin, end) in enumerate([(0, LENGTH), (LENGTH, LENGTH + SHORT)]):
        expected, limit = yardstick(exported.model, input_ids=ids[row : row + 1, : end - begin])
        assert difference(logits[begin:end], expected[0]) <= limit


def test_steps_of_rows_of_several_lengths_equal_the_whole_sequences(exported: Exported) -> None:
    """Prompts of 11 and 7, then nine single tokens each: longer than the window, written in place."""
    ids, lengths = token_ids(0, 2, LENGTH), [11, 7]
    embeds, graph = exported.embed(ids), InPlace(exported, 2)
    addresses = [values.ctypes.data for values in graph.cache.values()]
    made = [graph.run(embeds[:, :11], lengths, [10, 11 + 6])]
    for _ in range(9):
        token = np.stack([embeds[row, length][None] for row, length in enumerate(lengths)])
        lengths = [length + 1 for length in lengths]
        made.append(graph.run(token, lengths, [0, 1]))
    for row, length in enumerate(lengths):
        expected, limit = yardstick(exported.model, input_ids=ids[row : row + 1, :length])
        assert difference(np.stack([logits[row] for logits in made]), expected[0, length - 10 :]) <= limit
    assert addresses == [values.ctypes.data for values in graph.cache.values()]
    for values in graph.cache.values():
        assert np.isfinite(values[0, :, :20]).all(), "what was cached is in the buffer that was bound"
        assert np.isnan(values[0, :, 20:]).all(), "and nothing behind it"


def test_a_chunk_after_what_is_cached_equals_the_whole_sequence(exported: Exported) -> None:
    """What a prefix cache does: tokens known, then several more at once."""
    ids = token_ids(2, 1, LENGTH)
    embeds, graph = exported.embed(ids), InPlace(exported, 1)
    graph.run(embeds[:, :12], [12], [11])
    logits = graph.run(embeds[:, 12:], [LENGTH], list(range(LENGTH - 12)))
    expected, limit = yardstick(exported.model, input_ids=ids)
    assert difference(logits, expected[0, 12:]) <= limit


def test_wrong_cache_or_length_is_outside_the_limit(exported: Exported) -> None:
    """The limit of the tests above is tight enough to find what it is there to find."""
    ids = token_ids(1, 1, LENGTH)
    embeds = exported.embed(ids)
    expected, limit = yardstick(exported.model, input_ids=ids)

    def error(change: Any, length: int = LENGTH) -> float:
        graph = InPlace(exported, 1)
        graph.run(embeds[:, :-1], [LENGTH - 1], [0])
        change(graph.cache)
        return difference(graph.run(embeds[:, -1:], [length], [0]), expected[0, -1:])

    def cross(cache: dict[str, Array]) -> None:
        for name, values in cache.items():
            if name.endswith("key"):
                values[:, :, : LENGTH - 1] = values[:, :, LENGTH - 2 :: -1].copy()

    assert error(lambda cache: None) <= limit
    assert error(cross) > 10 * limit
    assert error(lambda cache: None, LENGTH - 1) > 10 * limit


def test_graph_has_the_names_and_dynamic_axes_of_the_contract(exported: Exported) -> None:
    inputs = {node.name: (node.shape, node.type) for node in exported.graph.get_inputs()}
    base = exported.manifest.base
    assert inputs.pop("inputs_embeds") == (["batch", "sequence", base.hidden_size], "tensor(float)")
    assert inputs.pop("sequence_lengths") == (["batch"], "tensor(int32)")
    assert inputs.pop("logits_at") == (["places"], "tensor(int64)")
    if base.architecture == "gpt2":
        assert inputs.pop("position_ids") == (["batch", "sequence"], "tensor(int64)")
    shape = ["batch", base.cache.kv_heads, "capacity", base.cache.head_dim]
    assert inputs == {f"past_key_values.{name}": (shape, "tensor(float)") for name in NAMES}
    assert [node.name for node in exported.graph.get_outputs()] == ["logits", *(f"present.{name}" for name in NAMES)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_half_precision_follows_the_float32_model(family: str, tmp_path: Path) -> None:
    skip_windows_of_old(family)
    model = ALL_DECODERS[family]()
    exported = open_exported(model, export_base(model, tmp_path, dtype="float16"), tmp_path, "onnxruntime-cpu")
    rounded, ids, lengths = in_half(model), token_ids(1, 2, 9), [9, 5]
    with torch.no_grad():
        embeds = rounded.get_input_embeddings()(ids).numpy()
        expected = [rounded(input_ids=ids[row : row + 1, :n]).logits.numpy()[0] for row, n in enumerate(lengths)]
    received = InPlace(exported, 2, np.float16).run(embeds, lengths, places(lengths))
    # Outputs, cache and some inner values are rounded to 11 bits, a few dozen times along the way.
    limit = 32 * 2.0**-11 * np.abs(np.concatenate(expected)).max()
    assert np.abs(received - np.concatenate(expected)).max() <= limit


@pytest.mark.parametrize(
    ("version", "is_old"), [("1.9.0", True), ("1.23.2", True), ("1.24.0", False), ("1.31.1", False)]
)
def test_windows_are_not_left_to_a_runtime_that_counts_them_wrongly(
    version: str, is_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_older(ort.__version__, WINDOWS_SINCE):
        pytest.skip("what is installed is such a runtime")
    for family, own in (("mistral-windowed", is_old), ("llama", False)):
        export_base(ALL_DECODERS[family](), tmp_path / family)
        with monkeypatch.context() as patched:
            patched.setattr(ort, "__version__", version)
            if own:
                with pytest.raises(BackendError, match=rf"needs ONNX Runtime {WINDOWS_SINCE}.*wrongly by {version}"):
                    Deployment.open(tmp_path / family)
            else:
                Deployment.open(tmp_path / family).close()
            lines: list[str] = []
            export_base(ALL_DECODERS[family](), tmp_path / family, replace=True, progress=lines.append)
            assert any("a token too many" in line for line in lines) == own
        nodes = {
            node.op_type
            for node in onnx.load(
                tmp_path / family / read_manifest(tmp_path / family).variants["onnxruntime-cpu"].graph
            ).graph.node
        }
        assert ("GroupQueryAttention" in nodes) != own


def test_each_layer_is_one_operator_fed_by_one_product(tmp_path: Path) -> None:
    export_base(ALL_DECODERS["llama"](), tmp_path)
    export_base(ALL_DECODERS["qwen3"](), tmp_path / "normed")
    graphs = [onnx.load(p / "base/onnxruntime-cpu/model.onnx").graph for p in (tmp_path, tmp_path / "normed")]
    plain, normed = ([node for node in graph.node if node.op_type == "GroupQueryAttention"] for graph in graphs)
    assert [list(node.input[1:3]) for node in plain] == [["", ""]] * LAYERS
    assert all(all(node.input[1:3]) for node in normed), "queries and keys have norms between product and attention"
    products = [node for node in graphs[0].node if node.op_type in ("MatMul", "Gemm")]
    assert [node.op_type for node in products[-2:]] == ["MatMul", "Gemm"], "a tied head has the table's rows"
    assert len(products) == 4 * LAYERS + 1
    assert not [node for node in graphs[0].node if node.op_type in ("Reshape", "Transpose", "Concat", "Shape")]


def test_heads_too_narrow_for_the_operator_keep_standard_attention(tmp_path: Path) -> None:
    lines: list[str] = []
    export_base(narrow_llama(), tmp_path, progress=lines.append)
    assert "attention is kept in standard operators: its heads are 12 wide, no multiple of 16" in lines
    inputs = {
        node.name for node in ort.InferenceSession(str(tmp_path / "base/onnxruntime-cpu/model.onnx")).get_inputs()
    }
    assert "attention_mask" in inputs


def test_tracing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = ALL_DECODERS["llama"]()
    with torch.no_grad():
        before = model(input_ids=token_ids(0)).logits
        groups = find_groups(model, lambda: model(input_ids=token_ids(0)))
        assert [len(group) for group in groups] == [3, 2] * LAYERS
        products = [MergedLinear(group) for group in groups]
        products[0].weight[0] += 1
        with merged(products):
            assert not torch.equal(model(input_ids=token_ids(0)).logits, before), "the merged weights are the ones used"
        products[0].weight[0] -= 1
        export_base(model, tmp_path)
        assert torch.equal(model(input_ids=token_ids(0)).logits, before)


def test_an_export_keeps_no_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own: list[weakref.ref[Any]] = []

    def note(model: Any, architecture: Any) -> str | None:
        own.append(weakref.ref(model))
        return why_not_grouped(model, architecture)

    monkeypatch.setattr("adalink.export.base.grouped_attention.why_not_grouped", note)
    export_base(ALL_DECODERS["llama"](), tmp_path)
    gc.collect()
    assert [model() for model in own] == [None]
