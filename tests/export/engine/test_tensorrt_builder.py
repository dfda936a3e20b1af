"""Engines are built into deployments for real, without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers.engines import PROFILE, RTX, SM86
from helpers.export import MODELS
from helpers.runtime import build, reseal

from adalink.export.adapter.embedder_graph import EMBEDDERS
from adalink.export.base.export import export_base
from adalink.export.engine.export import export_engine
from adalink.runtime.builds import builder_calls
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigError,
    DeploymentError,
    IntegrityError,
    UnknownTaskError,
)
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.runtime.trt.api import Api
from adalink.runtime.trt.record import read_record

FRONT_PLANS = {f"front-{embedder.replace('.', '-')}.plan" for embedder in EMBEDDERS}


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
    assert builder_calls() - calls == 1 + len(EMBEDDERS) + 2
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
    assert set(record.embedders) == set(EMBEDDERS)
    assert set(record.embedders.values()) == FRONT_PLANS
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
    "unknown task": (
        {"tasks": ["gamma"]},
        UnknownTaskError,
        r"'gamma' is not deployed .*: alpha, beta",
    ),
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
from adalink.export.engine.export import export_engine
from adalink.runtime.errors import WriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    export_engine(sys.argv[1], "tensorrt-rtx", target=("sm86",))
except WriteError as error:
    print("WriteError:", error)
"""


# A disk on which not even an embedder fits, and one that is too small for the base's plan.
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
