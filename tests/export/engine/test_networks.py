"""Networks of engines as TensorRT-RTX parses them: types, shapes and profiles, and what it says of wrong ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.engines import PROFILE, RTX, SM86
from helpers.export import MODELS
from helpers.tiny_models import HIDDEN_SIZE, LAYERS, MAX_POSITIONS, VOCAB_SIZE

from adalink.export.adapter.embedder_graph import EMBEDDERS, build_embedder_graph
from adalink.export.base.export import export_base
from adalink.export.engine.export import base_sizes, embedder_limits, embedder_sizes, export_engine
from adalink.export.engine.graph import engine_graph
from adalink.export.engine.progress import Phases
from adalink.export.engine.tensorrt_builder import PlanDraft
from adalink.runtime.errors import BackendError, GraphError
from adalink.runtime.profile import ShapeRange, default_profile
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.trt.api import Api
from adalink.runtime.trt.record import read_record


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    out = tmp_path_factory.mktemp(request.param)
    manifest = export_base(MODELS[request.param](), out, target="portable")
    return manifest, out / manifest.variants["portable"].graph


def names_and_types(network: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in (*inputs, *outputs)}


def layer_types(network: Any) -> Counter[str]:
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def test_a_decoder_network_writes_its_cache_in_place(api: Api, decoder: tuple[Manifest, Path]) -> None:
    manifest, path = decoder
    cache = manifest.base.cache
    assert cache is not None
    with PlanDraft(api, engine_graph(path, manifest.base, PROFILE.capacity), path, "engine.plan") as draft:
        for sizes in base_sizes(PROFILE):
            draft.add_profile(sizes)
        found = names_and_types(draft.network)
        kept = (-1, cache.kv_heads, 40, cache.head_dim)
        assert found.pop("inputs_embeds") == ("FLOAT", (-1, -1, HIDDEN_SIZE))
        assert found.pop("attention_mask") == ("INT64", (-1, -1))
        assert found.pop("position_ids") == ("INT64", (-1, -1))
        assert found.pop("logits_at") == ("INT64", (-1,))
        assert found.pop("write_indices") == ("INT64", (-1,))
        assert found.pop("logits") == ("FLOAT", (-1, VOCAB_SIZE))
        assert len(found) == 4 * LAYERS
        assert set(found.values()) == {("FLOAT", kept)}
        assert layer_types(draft.network)["KV_CACHE_UPDATE"] == 2 * LAYERS
        assert draft.network.get_flag(api.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert not draft.config.get_flag(api.trt.BuilderFlag.TF32)
        prefill, decode = draft.profiles
        assert [tuple(shape) for shape in prefill.get_shape("inputs_embeds")] == [(1, 1, 48), (2, 8, 48), (4, 16, 48)]
        assert [tuple(shape) for shape in decode.get_shape("inputs_embeds")] == [(1, 1, 48), (2, 1, 48), (4, 1, 48)]
        assert [tuple(shape) for shape in prefill.get_shape("attention_mask")] == [(1, 1), (2, 8), (4, 40)]
        assert [tuple(shape) for shape in decode.get_shape("attention_mask")] == [(1, 1), (2, 13), (4, 40)]
        assert [tuple(shape) for shape in prefill.get_shape("logits_at")] == [(1,), (2,), (16,)]
        assert [tuple(shape) for shape in decode.get_shape("logits_at")] == [(1,), (2,), (4,)]
        past = [tuple(shape) for shape in decode.get_shape("past_key_values.1.key")]
        assert past == [(batch, *kept[1:]) for batch in (1, 2, 4)]


def test_a_growing_decoder_builds_too(api: Api, decoder: tuple[Manifest, Path], tmp_path: Path) -> None:
    manifest, path = decoder
    with PlanDraft(api, engine_graph(path, manifest.base, None), path, "engine.plan") as draft:
        for sizes in base_sizes(PROFILE):
            draft.add_profile(sizes)
        assert layer_types(draft.network)["KV_CACHE_UPDATE"] == 0
        prefill, decode = draft.profiles
        assert [shape[2] for shape in prefill.get_shape("past_key_values.0.value")] == [0, 0, 39]
        assert [shape[2] for shape in decode.get_shape("past_key_values.0.value")] == [0, 12, 39]
        built = draft.build(tmp_path / "engine.plan", lambda config: api.set_targets(config, SM86), lambda *_: None)
    assert built.size_bytes == (tmp_path / "engine.plan").stat().st_size > 100_000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision_comes_from_the_graph(api: Api, dtype: str, tmp_path: Path) -> None:
    manifest = export_base(MODELS["qwen3"](), tmp_path, target="portable", dtype=dtype)
    path = tmp_path / manifest.variants["portable"].graph
    kind = {"float16": "HALF", "bfloat16": "BF16"}[dtype]
    with PlanDraft(api, engine_graph(path, manifest.base, 64), path, "engine.plan") as draft:
        found = names_and_types(draft.network)
        assert {found[name][0] for name in ("inputs_embeds", "logits", "present.0.key")} == {kind}
        products = [
            draft.network.get_layer(index).get_output(0).dtype.name
            for index in range(draft.network.num_layers)
            if draft.network.get_layer(index).type.name == "MATRIX_MULTIPLY"
        ]
        assert products.count(kind) >= 7 * LAYERS + 1, "every layer's matrices and the head"
    own = export_engine(tmp_path, RTX, target=SM86).variants[RTX]
    assert (tmp_path / own.graph).stat().st_size > 100_000


@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_front_networks_take_table_weights_and_choice(api: Api, embedder: str, decoder: tuple[Manifest, Path]) -> None:
    base = decoder[0].base
    rank, slots = embedder_limits(base.hidden_size)
    with PlanDraft(api, build_embedder_graph(embedder, base), None, embedder) as draft:
        draft.add_profile(embedder_sizes(PROFILE, rank, slots))
        found = names_and_types(draft.network)
        (profile,) = draft.profiles
        assert [tuple(shape) for shape in profile.get_shape("down")] == [(1, 1, 48), (16, 16, 48), (16384, 48, 48)]
        assert [tuple(shape) for shape in profile.get_shape("task_index")] == [(1,), (2,), (4,)]
    assert found["up"] == ("FLOAT", (-1, HIDDEN_SIZE, -1))
    assert found["task_index"] == ("INT64", (-1,))
    own = {"table": ("FLOAT", (VOCAB_SIZE, 48)), "input_ids": ("INT64", (-1, -1))}
    if embedder.endswith(".embeds"):
        own = {"inputs_embeds": ("FLOAT", (-1, -1, 48)), "is_adapted": ("BOOL", (-1, -1))}
    assert own.items() <= found.items()


@pytest.mark.parametrize("width", [1, 48, 576, 4096, 16384, 1 << 20])
def test_a_stack_of_weights_stays_below_what_a_tensor_may_hold(width: int) -> None:
    rank, slots = embedder_limits(width)
    assert 1 <= rank <= width
    assert 1 <= slots <= 1 << 14
    assert rank * slots * width < 1 << 31


def test_a_dimension_without_a_size_is_named(api: Api, decoder: tuple[Manifest, Path]) -> None:
    manifest, path = decoder
    with PlanDraft(api, engine_graph(path, manifest.base, 64), path, "engine.plan") as draft:
        sizes = {name: span for name, span in base_sizes(PROFILE)[0].items() if name != "total"}
        with pytest.raises(GraphError, match="input attention_mask has a dimension 'total'"):
            draft.add_profile(sizes)


def test_a_network_without_a_profile_is_refused_in_the_builders_words(
    api: Api, decoder: tuple[Manifest, Path], tmp_path: Path
) -> None:
    manifest, path = decoder
    with (
        PlanDraft(api, engine_graph(path, manifest.base, 64), path, "engine.plan") as draft,
        pytest.raises(BackendError, match="no optimization profile has been defined"),
    ):
        draft.build(tmp_path / "x.plan", lambda config: api.set_targets(config, SM86), lambda *_: None)
    assert not (tmp_path / "x.plan").exists()


def test_phases_inside_one_another_make_one_fraction() -> None:
    phases = Phases()
    assert phases.now() == ("", 0.0)
    phases.begin("whole", None, 4)
    phases.step("whole", 0)
    phases.begin("part", "whole", 2)
    phases.step("part", 0)
    assert phases.now() == ("part", 0.375)
    phases.end("part")
    phases.step("whole", 9)
    phases.step("never begun", 1)
    assert phases.now() == ("whole", 1.0)


def test_default_profile_covers_the_whole_model(api: Api, decoder: tuple[Manifest, Path]) -> None:
    base = decoder[0].base
    prefill, decode = base_sizes(default_profile(base))
    assert prefill["total"].max == decode["total"].max == MAX_POSITIONS
    assert prefill["total"].min == decode["total"].min == 1
    assert prefill["sequence"].min == 1
    wide = msgspec.structs.replace(PROFILE, batch=ShapeRange(3, 4, 64))
    assert base_sizes(wide)[0]["places"] == ShapeRange(1, 4, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timings_are_kept_for_the_next_build(
    api: Api, decoder: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX has the calls of TensorRT's timing cache, which it leaves empty: enough to see that they fit."""
    monkeypatch.setattr(Api, "has_timing_cache", property(lambda self: True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    embedder, sizes = build_embedder_graph(EMBEDDERS[0], decoder[0].base), embedder_sizes(PROFILE, 48, 64)
    kept = tmp_path / f"cache/adalink/timing/{RTX}-{api.version}.cache"

    def build() -> int:
        with PlanDraft(api, embedder, None, "front.plan") as draft:
            draft.add_profile(sizes)
            return draft.build(tmp_path / "x", lambda config: api.set_targets(config, SM86), lambda *_: None).size_bytes

    first = build()
    assert kept.stat().st_size > 0
    assert kept.stat().st_mode & 0o077 == 0, "the user's own"
    assert build() == first
    kept.write_bytes(b"damaged")
    assert build() == first


def test_an_encoder_has_one_profile(api: Api, tmp_path: Path) -> None:
    manifest = export_base(MODELS["bert"](), tmp_path, target="portable")
    after = export_engine(tmp_path, RTX, target=("sm80", "sm120"), profile="batch=1:2:8,seq=4:16:32", name="wide")
    record = read_record(tmp_path / "engines/wide")
    assert (record.cache, record.target, record.profile.past) == (None, ("sm80", "sm120"), None)
    path = tmp_path / after.variants["portable"].graph
    with PlanDraft(api, engine_graph(path, manifest.base, None), path, "engine.plan") as draft:
        for sizes in base_sizes(record.profile):
            draft.add_profile(sizes)
        (profile,) = draft.profiles
        assert [tuple(shape) for shape in profile.get_shape("attention_mask")] == [(1, 4), (2, 16), (8, 32)]
        assert [tuple(shape) for shape in profile.get_shape("token_type_ids")] == [(1, 4), (2, 16), (8, 32)]
        assert names_and_types(draft.network)["token_type_ids"] == ("INT64", (-1, -1))
        assert names_and_types(draft.network)["last_hidden_state"] == ("FLOAT", (-1, -1, HIDDEN_SIZE))
