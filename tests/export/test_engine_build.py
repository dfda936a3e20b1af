"""Engines are built for real, without a GPU; what cannot be loaded here is inspected before it is built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from export_support import MODELS
from runtime_support import build, reseal
from tiny_models import HIDDEN_SIZE, LAYERS, MAX_POSITIONS, VOCAB_SIZE

from adalink.export.base import export_base
from adalink.export.engine import base_sizes, export_engine, front_limits, front_sizes
from adalink.export.engine_build import PlanDraft
from adalink.export.engine_graph import engine_graph
from adalink.export.engine_progress import Phases
from adalink.export.front_graph import FRONTS, build_front_graph
from adalink.runtime.builds import builder_calls
from adalink.runtime.digest import digest_file
from adalink.runtime.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigError,
    DeploymentError,
    GraphError,
    IntegrityError,
    UnknownTaskError,
)
from adalink.runtime.integrity import verify_files
from adalink.runtime.manifest import Manifest
from adalink.runtime.manifest_file import read_manifest
from adalink.runtime.nvidia.gpus import find_gpus
from adalink.runtime.nvidia.profile import Profile, Span, default_profile
from adalink.runtime.nvidia.record import read_record
from adalink.runtime.nvidia.tensorrt_api import Api, load_api
from adalink.runtime.variants import choose_variant

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'adalink-kit[tensorrt-rtx]'"
)

RTX, SM86 = "tensorrt-rtx", ("sm86",)
PROFILE = Profile(batch=Span(1, 2, 4), seq=Span(1, 8, 16), past=Span(0, 12, 39))
FRONT_PLANS = {f"front-{front.replace('.', '-')}.plan" for front in FRONTS}


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api(RTX)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    out = tmp_path_factory.mktemp(request.param)
    manifest = export_base(MODELS[request.param](), out, target="portable")
    return manifest, out / manifest.variants["portable"].graph


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment with tasks and with both variants of its base."""
    tiny = build("llama", tmp_path_factory.mktemp("engines"), ("text", "image"))
    export_base(tiny.model, tiny.folder, target="portable", modalities=("text", "image"))
    return tiny.folder


@pytest.fixture
def deployment(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "deployment"))


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest_file(path) for path in folder.rglob("*") if path.is_file()}


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


@pytest.mark.parametrize("front", FRONTS)
def test_front_networks_take_table_weights_and_choice(api: Api, front: str, decoder: tuple[Manifest, Path]) -> None:
    base = decoder[0].base
    rank, slots = front_limits(base.hidden_size)
    with PlanDraft(api, build_front_graph(front, base), None, front) as draft:
        draft.add_profile(front_sizes(PROFILE, rank, slots))
        found = names_and_types(draft.network)
        (profile,) = draft.profiles
        assert [tuple(shape) for shape in profile.get_shape("down")] == [(1, 1, 48), (16, 16, 48), (16384, 48, 48)]
        assert [tuple(shape) for shape in profile.get_shape("task_index")] == [(1,), (2,), (4,)]
    assert found["up"] == ("FLOAT", (-1, HIDDEN_SIZE, -1))
    assert found["task_index"] == ("INT64", (-1,))
    own = {"table": ("FLOAT", (VOCAB_SIZE, 48)), "input_ids": ("INT64", (-1, -1))}
    if front.endswith(".embeds"):
        own = {"inputs_embeds": ("FLOAT", (-1, -1, 48)), "is_adapted": ("BOOL", (-1, -1))}
    assert own.items() <= found.items()


@pytest.mark.parametrize("width", [1, 48, 576, 4096, 16384, 1 << 20])
def test_a_stack_of_weights_stays_below_what_a_tensor_may_hold(width: int) -> None:
    rank, slots = front_limits(width)
    assert 1 <= rank <= width
    assert 1 <= slots <= 1 << 14
    assert rank * slots * width < 1 << 31


def test_an_engine_is_added_and_nothing_else_changes(api: Api, deployment: Path) -> None:
    before, calls = contents(deployment), builder_calls()
    seen: list[tuple[str, float | None]] = []
    manifest = export_engine(
        deployment,
        RTX,
        target=SM86,
        profile=PROFILE,
        tasks=["double", "alpha", "alpha"],
        progress=lambda *at: seen.append(at),
    )
    assert builder_calls() - calls == 1 + len(FRONTS) + 2
    after = contents(deployment)
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed <= {"manifest.json", ".lock"}
    assert {path for path in after if path not in before} == {
        f"engines/{RTX}/{name}"
        for name in {"engine.plan", "engine.json", "task-alpha.plan", "task-double.plan"} | FRONT_PLANS
    }
    verify_files(deployment, manifest)
    assert read_manifest(deployment) == manifest
    own = manifest.variants[RTX]
    assert (own.target, own.backends, own.is_compiled) == (RTX, (RTX,), True)
    assert not manifest.variants["portable"].is_compiled
    assert choose_variant(manifest, RTX) == RTX
    assert choose_variant(manifest, "onnxruntime-cpu") == "onnxruntime-cpu"

    record = read_record(deployment / "engines" / RTX)
    portable = manifest.variants["portable"].graph
    assert record.onnx_sha256 == manifest.files[portable].sha256 == digest_file(deployment / portable)
    assert record.weights_sha256 == digest_file(deployment / f"{portable}.data")
    assert (record.backend, record.version, record.target) == (RTX, api.version, SM86)
    assert (record.variant, record.profile, record.cache) == ("portable", PROFILE, "in-place")
    assert set(record.fronts) == set(FRONTS)
    assert set(record.fronts.values()) == FRONT_PLANS
    assert record.tasks == {"double": "task-double.plan", "alpha": "task-alpha.plan"}
    assert record.plan_bytes == manifest.files[own.graph].size_bytes
    assert 0 < record.build_seconds < 600
    fractions = [done for _, done in seen if done is not None]
    assert fractions
    assert all(0 <= done <= 1 for done in fractions)
    jobs = [line for line, _ in seen]
    assert jobs[0] == "reading the portable graph"
    assert any(line.startswith("building engine.plan: ") for line in jobs)
    for plan in own.files:
        if plan.endswith(".plan"):
            verdict = api.validity((deployment / plan).read_bytes())
            assert verdict is not None
            assert "malformed engine" not in verdict[1]


def test_a_damaged_plan_has_a_malformed_header(api: Api, deployment: Path) -> None:
    manifest = export_engine(deployment, RTX, target=SM86)
    plan = bytearray((deployment / manifest.variants[RTX].graph).read_bytes())
    plan[:8] = b"ONNX" * 2
    verdict = api.validity(bytes(plan))
    assert verdict is not None
    assert verdict[1] == ("malformed engine",)


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
        assert names_and_types(draft.network)["last_hidden_state"] == ("FLOAT", (-1, -1, HIDDEN_SIZE))


def test_replacing_takes_a_fresh_folder(deployment: Path) -> None:
    export_engine(deployment, RTX, target=SM86)
    before = contents(deployment)
    with pytest.raises(DeploymentError, match=r"already has an engine 'tensorrt-rtx': pass --replace"):
        export_engine(deployment, RTX, target=SM86)
    assert contents(deployment) == before
    manifest = export_engine(deployment, RTX, target=("sm89",), replace=True)
    assert manifest.variants[RTX].graph == f"engines/{RTX}.2/engine.plan"
    assert read_record(deployment / f"engines/{RTX}.2").target == ("sm89",)
    assert {path.name for path in (deployment / "engines").iterdir()} == {RTX, f"{RTX}.2"} - {RTX}


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "order of a profile": ({"profile": "batch=4:2:1"}, ConfigError, r"batch=4:2:1, expected sizes in rising order"),
    "longer than the base": ({"profile": "seq=1:8:65"}, ConfigError, r"seq=1:8:65, expected .* to 64"),
    "unknown target": ({"target": ("sm86", "sm90")}, ConfigError, r"target is 'sm90', expected any of sm75, sm80"),
    "mixed target": ({"target": ("sm86", "portable")}, ConfigError, r"target is sm86, portable, expected"),
    "no target": ({"target": ()}, ConfigError, r"target is empty, expected"),
    "unknown task": ({"tasks": ["gamma"]}, UnknownTaskError, r"'gamma' is not in .*: deployed are alpha, beta"),
    "unknown variant": ({"variant": "int4"}, ConfigError, r"'int4', expected one of onnxruntime-cpu, portable"),
    "other variant": ({"variant": "onnxruntime-cpu"}, ConfigError, r"for onnxruntime-cpu: .*--target portable"),
    "name of a graph": ({"name": "portable", "replace": True}, DeploymentError, r"is a graph, not an engine"),
    "name of no folder": ({"name": "../x"}, DeploymentError, r"engine name '../x': expected 1 to 64"),
    "no float32 on Turing": ({"target": ("sm75",)}, BackendError, r"was not built: .*FP32 GEMM is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_and_nothing_changes(case: str, deployment: Path) -> None:
    changes, kind, words = REFUSED[case]
    before = contents(deployment)
    with pytest.raises(kind, match=words):
        export_engine(deployment, RTX, **({"target": SM86} | changes))
    assert {**contents(deployment), ".lock": ""} == {**before, ".lock": ""}
    assert not (deployment / "engines").exists()


@pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU")
def test_the_current_gpu_must_be_there(deployment: Path) -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"'current' on a GPU only, and .*: say what .* sm86, .* portable"
    ):
        export_engine(deployment, RTX)


def test_without_a_portable_variant_the_error_says_how_to_add_one(tmp_path: Path) -> None:
    export_base(MODELS["llama"](), tmp_path)
    with pytest.raises(DeploymentError, match=r"no portable base graph .* only onnxruntime-cpu: .*--target portable"):
        export_engine(tmp_path, RTX, target=SM86)
    with pytest.raises(BackendError, match=r"no engine for tensorrt-rtx.*'adalink export engine DIR --backend tens"):
        choose_variant(read_manifest(tmp_path), RTX)
    with pytest.raises(BackendError, match=r"'onnxruntime-cpu' is for onnxruntime-cpu, not for tensorrt-rtx: choose"):
        choose_variant(read_manifest(tmp_path), RTX, "onnxruntime-cpu")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    export_base(MODELS["t5"](), tmp_path, target="portable")
    with pytest.raises(ConfigError, match=r"is an encoder-decoder: engines are built for decoders and encoders only"):
        export_engine(tmp_path, RTX, target=SM86)


def test_a_quantised_variant_is_refused(tmp_path: Path) -> None:
    export_base(MODELS["llama"](), tmp_path, quantization="int8")
    with pytest.raises(ConfigError, match=r"'int8' is quantised with operators of ONNX Runtime: .*--target portable"):
        export_engine(tmp_path, RTX, target=SM86, variant="int8")


def test_an_operator_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    manifest = export_base(MODELS["bert"](), tmp_path, target="portable")
    path = tmp_path / manifest.variants["portable"].graph
    model = onnx.load(str(path), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmaximum"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="altered"):
        export_engine(tmp_path, RTX, target=SM86)
    reseal(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(BackendError, match=r"engine.plan: its graph cannot be parsed: tensorrt_rtx.*Softmaximum"):
        export_engine(tmp_path, RTX, target=SM86)
    assert {**contents(tmp_path), ".lock": ""} == {**before, ".lock": ""}


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_what_is_raised_while_it_reports_stops_the_build(error: type[BaseException], deployment: Path) -> None:
    before = contents(deployment)

    def report(line: str, done: float | None) -> None:
        if line.startswith("building engine.plan"):
            raise error

    with pytest.raises((error, DeploymentError)):
        export_engine(deployment, RTX, target=SM86, progress=report)
    assert {**contents(deployment), ".lock": ""} == {**before, ".lock": ""}
    assert not (deployment / "engines").exists()


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
    assert prefill["total"].largest == decode["total"].largest == MAX_POSITIONS
    assert prefill["total"].smallest == decode["total"].smallest == 1
    assert prefill["sequence"].smallest == 1
    wide = msgspec.structs.replace(PROFILE, batch=Span(3, 4, 64))
    assert base_sizes(wide)[0]["places"] == Span(1, 4, 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timings_are_kept_for_the_next_build(
    api: Api, decoder: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX has the calls of TensorRT's timing cache, which it leaves empty: enough to see that they fit."""
    monkeypatch.setattr(Api, "has_timing_cache", property(lambda self: True))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    front, sizes = build_front_graph(FRONTS[0], decoder[0].base), front_sizes(PROFILE, 48, 64)
    kept = tmp_path / f"cache/adalink/timing/{RTX}-{api.version}.cache"

    def build() -> int:
        with PlanDraft(api, front, None, "front.plan") as draft:
            draft.add_profile(sizes)
            return draft.build(tmp_path / "x", lambda config: api.set_targets(config, SM86), lambda *_: None).size_bytes

    first = build()
    assert kept.stat().st_size > 0
    assert kept.stat().st_mode & 0o077 == 0, "the user's own"
    assert build() == first
    kept.write_bytes(b"damaged")
    assert build() == first


@pytest.mark.gpu
def test_an_engine_for_the_gpu_of_this_machine(api: Api, deployment: Path) -> None:
    found = find_gpus()
    if not found.devices or found.devices[0].capability not in api.targets:
        pytest.skip(f"TensorRT-RTX builds for {', '.join(api.targets)}, here is {found}")
    manifest = export_engine(deployment, RTX, profile=PROFILE)
    assert read_record(deployment / "engines" / RTX).target == ("current",)
    plan = (deployment / manifest.variants[RTX].graph).read_bytes()
    verdict = api.validity(plan)
    assert verdict == ("valid", ())
    runtime = api.make_runtime()
    engine = runtime.deserialize_cuda_engine(plan)
    assert engine is not None, api.error("engine.plan", "")
    assert engine.num_optimization_profiles == 2
    assert engine.get_aliased_input_tensor("present.0.key") == "past_key_values.0.key"
    low, likely, high = (tuple(shape) for shape in engine.get_tensor_profile_shape("attention_mask", 1))
    assert (low, likely, high) == ((1, 1), (2, 13), (4, 40))


LIMITED = """
import resource, signal, sys
from adalink.export.engine import export_engine
from adalink.runtime.errors import WriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    export_engine(sys.argv[1], "tensorrt-rtx", target=("sm86",))
except WriteError as error:
    print("WriteError:", error)
"""


# A disk on which not even a front fits, and one that is too small for the base's plan.
@pytest.mark.parametrize("size_bytes", [10_000, 1_500_000])
def test_a_disk_that_refuses_to_grow_leaves_the_deployment_as_it_was(size_bytes: int, deployment: Path) -> None:
    before = contents(deployment)
    command = [sys.executable, "-c", LIMITED, str(deployment), str(size_bytes)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("WriteError: deployment ")
    assert "the deployment is as it was. Free space" in result.stdout
    assert {**contents(deployment), ".lock": ""} == {**before, ".lock": ""}
    assert not (deployment / "engines").exists()
