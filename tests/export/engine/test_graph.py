"""The graph of an engine computes what the portable graph and PyTorch compute, with its cache in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.export import ALL_DECODERS, LENGTH, MODELS, SHORT, Array, Exported, difference, open_exported, yardstick
from helpers.tiny_models import token_ids
from onnx import helper

from adalink.export.base.export import export_base
from adalink.export.engine.graph import engine_graph
from adalink.runtime.errors import ConfigError, GraphError

CAPACITY = 32
# A prompt in three pieces, then single tokens; and how many positions more than needed each pass looks at.
PIECES = ((9, 5), (4, 0), (3, 9), (1, 2), (1, 0), (1, 11), (1, 12))
runs_in_place = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24), reason="this ONNX Runtime has no TensorScatter"
)


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Path]:
    model, out = MODELS[request.param](), tmp_path_factory.mktemp(request.param)
    manifest = export_base(model, out, target="portable")
    return open_exported(model, manifest, out, "portable"), out / manifest.variants["portable"].graph


on_each = pytest.mark.parametrize("exported", ALL_DECODERS, indirect=True)
on_llama = pytest.mark.parametrize("exported", ["llama"], indirect=True)


def open_graph(model: onnx.ModelProto, portable: Path) -> ort.InferenceSession:
    """A session on a graph whose weights lie beside the portable one."""
    path = portable.with_name("engine.onnx")
    path.write_bytes(model.SerializeToString())
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that a cache of main memory is copied
    return ort.InferenceSession(str(path), options)


class InPlace:
    """A batch whose cache of ``CAPACITY`` positions began as noise, run piece by piece."""

    def __init__(self, graph: onnx.ModelProto, exported: Exported, portable: Path, batch: int) -> None:
        self.session = open_graph(graph, portable)
        cache = exported.manifest.base.cache
        rng = np.random.default_rng(8)
        shape = (batch, cache.kv_heads, CAPACITY, cache.head_dim)
        self.cache = {name: rng.normal(size=shape).astype(np.float32) for name in exported.empty_cache(batch)}
        self.noise = dict(self.cache)
        self.begin = 0

    def run(self, embeds: Array, mask: Array, positions: Array, logits_at: Sequence[int] | None = None) -> Array:
        """Logits at every position, shape ``(batch, n, vocab)``, or at the places asked for.

        ``mask`` is longer than needed by as many positions as shall be looked at in vain.
        """
        batch, count, _ = embeds.shape
        at = np.arange(batch * count) if logits_at is None else np.array(logits_at)
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": positions,
            "logits_at": at.astype(np.int64),
            "write_indices": np.full(batch, self.begin, np.int64),
        }
        outputs = [node.name for node in self.session.get_outputs()]
        wanted = {node.name for node in self.session.get_inputs()}
        given = {name: value for name, value in (feeds | self.cache).items() if name in wanted}
        results = dict(zip(outputs, self.session.run(outputs, given), strict=True))
        logits = results.pop("logits")
        assert logits.shape[0] == at.size
        self.cache = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        self.begin += count
        return logits.reshape(batch, count, -1) if logits_at is None else logits


def padded_batch(exported: Exported) -> tuple[torch.Tensor, Array, Array, Array]:
    """Ids, embeddings, mask and positions of a long row and a short one with padding on its left."""
    ids = token_ids(0, 2, LENGTH)
    mask, positions = np.ones((2, LENGTH), np.int64), np.tile(np.arange(LENGTH), (2, 1))
    mask[1, : LENGTH - SHORT] = 0
    positions[1] = np.maximum(np.arange(LENGTH) - (LENGTH - SHORT), 0)
    return ids, exported.embed(ids), mask, positions


def in_pieces(runner: InPlace, embeds: Array, mask: Array, positions: Array) -> Array:
    """Logits of all positions, taken as ``PIECES`` says; positions in vain have ones in the mask."""
    parts, begin = [], 0
    for count, spare in PIECES:
        end = begin + count
        looked_at = np.concatenate([mask[:, :end], np.ones((len(mask), spare), np.int64)], axis=1)
        parts.append(runner.run(embeds[:, begin:end], looked_at, positions[:, begin:end]))
        begin = end
    assert begin == LENGTH
    return np.concatenate(parts, axis=1)


@runs_in_place
@on_each
def test_pieces_in_a_noisy_cache_equal_pytorch_and_the_portable_graph(exported: tuple[Exported, Path]) -> None:
    case, path = exported
    ids, embeds, mask, positions = padded_batch(case)
    runner = InPlace(engine_graph(path, case.manifest.base, CAPACITY), case, path, 2)
    logits = in_pieces(runner, embeds, mask, positions)
    whole = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    names = [node.name for node in case.graph.get_outputs()]
    portable = dict(zip(names, case.graph.run(None, whole | case.empty_cache(2)), strict=True))
    for row, start in ((0, 0), (1, LENGTH - SHORT)):
        expected, limit = yardstick(case.model, input_ids=ids[row : row + 1, start:])
        assert difference(logits[row, start:], expected[0]) <= limit
        assert difference(logits[row, start:], portable["logits"][row, start:]) <= limit
        assert difference(logits[row, start:], np.roll(expected[0], 1, axis=0)) > 100 * limit
    for name, value in runner.cache.items():
        assert value.shape[2] == CAPACITY
        np.testing.assert_array_equal(value[:, :, LENGTH:], runner.noise[name][:, :, LENGTH:])
        grown = portable[name.replace("past_key_values", "present")]
        np.testing.assert_allclose(value[0, :, :LENGTH], grown[0], rtol=1e-4, atol=1e-4)


@runs_in_place
@on_llama
def test_writing_one_position_too_far_is_seen(exported: tuple[Exported, Path]) -> None:
    case, path = exported
    ids, embeds, mask, positions = padded_batch(case)
    runner = InPlace(engine_graph(path, case.manifest.base, CAPACITY), case, path, 2)
    runner.run(embeds[:, :9], mask[:, :9], positions[:, :9])
    runner.begin += 1
    wide = np.concatenate([mask[:, :9], np.ones((2, 12), np.int64)], axis=1)
    logits = runner.run(embeds[:, 9:], wide, positions[:, 9:])
    expected, limit = yardstick(case.model, input_ids=ids[:1])
    assert difference(logits[0], expected[0, 9:]) > 100 * limit


@on_each
def test_a_growing_cache_gives_logits_where_they_are_wanted(exported: tuple[Exported, Path]) -> None:
    case, path = exported
    ids, embeds, mask, positions = padded_batch(case)
    session = open_graph(engine_graph(path, case.manifest.base, None), path)
    feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions} | case.empty_cache(2)
    places = [LENGTH - 1, 2 * LENGTH - 1, 3, 3]
    (logits, *cache) = session.run(None, feeds | {"logits_at": np.array(places, np.int64)})
    (expected, *expected_cache) = case.graph.run(None, feeds)
    _, limit = yardstick(case.model, input_ids=ids[:1])
    assert difference(logits, expected.reshape(2 * LENGTH, -1)[places]) <= limit
    for own, other in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_names_types_and_shapes_of_a_narrow_decoder(dtype: str, tmp_path: Path) -> None:
    manifest = export_base(MODELS["qwen3"](), tmp_path, target="portable", dtype=dtype)
    path = tmp_path / manifest.variants["portable"].graph
    before = path.read_bytes()
    model = engine_graph(path, manifest.base, CAPACITY)
    kind = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}[dtype]
    values = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    shapes = {name: [d.dim_param or d.dim_value for d in value.shape.dim] for name, value in values.items()}
    assert shapes["logits"] == ["places", 96]
    assert shapes["logits_at"] == ["places"]
    assert shapes["write_indices"] == ["batch"]
    assert shapes["past_key_values.1.value"] == shapes["present.1.value"] == ["batch", 2, CAPACITY, 16]
    assert {values[name].elem_type for name in ("inputs_embeds", "logits", "present.0.key")} == {kind}
    assert {values[name].elem_type for name in ("logits_at", "write_indices")} == {onnx.TensorProto.INT64}
    assert [node.op_type for node in model.graph.node].count("TensorScatter") == 4
    assert path.read_bytes() == before


@pytest.mark.parametrize("exported", ["bert"], indirect=True)
def test_an_encoder_stays_as_it_is(exported: tuple[Exported, Path]) -> None:
    case, path = exported
    expected = onnx.load(str(path), load_external_data=False)
    assert engine_graph(path, case.manifest.base, None) == expected


@on_llama
def test_an_encoder_decoder_is_refused(exported: tuple[Exported, Path]) -> None:
    case, path = exported
    base = msgspec.structs.replace(case.manifest.base, kind="encoder-decoder")
    with pytest.raises(ConfigError, match=r"is an encoder-decoder: .* --backend onnxruntime-cpu"):
        engine_graph(path, base, None)


def nodes_of(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def read_past_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Shape", ["past_key_values.0.key"], ["extra"]))


def swap_joined(model: onnx.ModelProto) -> None:
    (node,) = (n for n in nodes_of(model, "Concat") if n.input[0] == "past_key_values.1.value")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def lose_difference(model: onnx.ModelProto) -> None:
    nodes_of(model, "Sub")[0].op_type = "Max"


def read_total_elsewhere(model: onnx.ModelProto) -> None:
    total = nodes_of(model, "Sub")[0].input[0]
    model.graph.node.append(helper.make_node("Neg", [total], ["extra"]))


def end_in_softmax(model: onnx.ModelProto) -> None:
    (head,) = (node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "raw"
    model.graph.node.append(helper.make_node("Softmax", ["raw"], ["logits"]))


@on_llama
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (read_past_elsewhere, r"past_key_values.0.key read by Concat to present.0.key, Shape to extra, expected one"),
        (swap_joined, r"past_key_values.1.value read by Concat to present.1.value"),
        (lose_difference, r"0 differences of the lengths"),
        (
            read_total_elsewhere,
            r"1 differences of the lengths of attention_mask and inputs_embeds, and the mask's length read by Neg",
        ),
        (end_in_softmax, r"logits made by Softmax"),
    ],
)
def test_another_pattern_is_named(
    damage: Callable[[onnx.ModelProto], None], found: str, exported: tuple[Exported, Path], tmp_path: Path
) -> None:
    case, path = exported
    model = onnx.load(str(path), load_external_data=False)
    damage(model)
    other = tmp_path / "model.onnx"
    other.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=f"model.onnx: {found}.*--target portable"):
        engine_graph(other, case.manifest.base, CAPACITY)


@runs_in_place
@on_llama
def test_scales_and_caps_after_the_head_are_kept(exported: tuple[Exported, Path], tmp_path: Path) -> None:
    """A head followed by a bias and a soft cap: logits are gathered in front of the product, the rest follows."""
    case, path = exported
    model = onnx.load(str(path))
    (head,) = (node for node in model.graph.node if node.output[0] == "logits")
    head.output[0] = "raw"
    bias = np.linspace(-3, 3, 96, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(5), "cap"))
    model.graph.node.extend(
        [
            helper.make_node("Add", ["raw", "bias"], ["biased"]),
            helper.make_node("Div", ["biased", "cap"], ["small"]),
            helper.make_node("Tanh", ["small"], ["capped"]),
            helper.make_node("Mul", ["cap", "capped"], ["logits"]),
        ]
    )
    changed = tmp_path / "model.onnx"
    onnx.save(model, str(changed))
    runner = InPlace(engine_graph(changed, case.manifest.base, CAPACITY), case, changed, 2)
    ids, embeds, mask, positions = padded_batch(case)
    places = [19, 39, 0]
    logits = runner.run(embeds, mask, positions, places)
    expected, limit = yardstick(case.model, input_ids=ids[:1])
    wanted = 5 * np.tanh((expected[0][[19, 0]] + bias) / 5)
    assert difference(logits[[0, 2]], wanted) <= limit
