"""Options of ONNX Runtime's providers for GPUs: shapes for every request, names as the graph has them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
from helpers.runtime import build

from adalink.export.base.export import export_base
from adalink.runtime.ort.gpu_backend import CUDA, RTX, TENSORRT, profile_shapes, provider_options
from adalink.runtime.profile import default_profile
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    tiny = build(request.param, tmp_path_factory.mktemp(request.param))
    export_base(tiny.model, tiny.folder, target="portable")
    manifest = read_manifest(tiny.folder)
    return manifest, tiny.folder / manifest.variants["portable"].graph


def parsed(text: str) -> dict[str, tuple[int, ...]]:
    pairs = (entry.rpartition(":") for entry in text.split(","))
    return {name: tuple(int(size) for size in shape.split("x")) for name, _, shape in pairs}


def test_shapes_cover_every_request_and_name_every_input(exported: tuple[Manifest, Path]) -> None:
    manifest, graph = exported
    base = manifest.base
    profile = default_profile(base)
    session = ort.InferenceSession(str(graph))
    low, likely, high = (parsed(profile_shapes(base, profile, which)) for which in ("min", "opt", "max"))
    assert low.keys() == likely.keys() == high.keys() == {node.name for node in session.get_inputs()}
    for node in session.get_inputs():
        for size, least, usual, most in zip(
            node.shape, low[node.name], likely[node.name], high[node.name], strict=True
        ):
            assert least <= usual <= most
            if isinstance(size, int):
                assert least == most == size
    assert high["attention_mask"][1] == profile.capacity
    if profile.past is not None:
        # The last step: one token after the longest past.
        assert high["past_key_values.0.key"][2] == profile.capacity - 1
        assert low["past_key_values.0.key"][2] == 0


def test_engines_of_providers_are_kept_in_the_users_own_folder(
    exported: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, graph = exported
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = default_profile(manifest.base)
    options = {name: provider_options(name, graph, manifest.base, profile) for name in (CUDA, TENSORRT, RTX)}
    assert options[CUDA] == {"device_id": "0", "use_tf32": "0"}
    for name, prefix, place in ((TENSORRT, "trt", "trt_engine_cache_path"), (RTX, "nv", "nv_runtime_cache_path")):
        folder = Path(options[name][place])
        assert folder.is_relative_to(tmp_path)
        assert folder.stat().st_mode & 0o077 == 0
        for which in ("min", "opt", "max"):
            assert options[name][f"{prefix}_profile_{which}_shapes"] == profile_shapes(manifest.base, profile, which)
    assert options[TENSORRT]["trt_engine_cache_enable"] == "1"
    again = provider_options(TENSORRT, graph, manifest.base, profile)
    assert again["trt_engine_cache_path"] == options[TENSORRT]["trt_engine_cache_path"]
    assert all(isinstance(value, str) for own in options.values() for value in own.values())


def test_another_base_of_the_same_graph_never_finds_its_engines(
    exported: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, graph = exported
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tmp_path / graph.name
    other.write_bytes(graph.read_bytes())
    weights = bytearray(graph.with_name(f"{graph.name}.data").read_bytes())
    weights[len(weights) // 2] ^= 1
    other.with_name(f"{graph.name}.data").write_bytes(weights)
    profile = default_profile(manifest.base)
    places = {
        provider_options(TENSORRT, path, manifest.base, profile)["trt_engine_cache_path"] for path in (graph, other)
    }
    assert len(places) == 2


def test_a_user_who_cannot_keep_engines_goes_without(
    exported: tuple[Manifest, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, graph = exported
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    profile = default_profile(manifest.base)
    assert "trt_engine_cache_enable" not in provider_options(TENSORRT, graph, manifest.base, profile)
    assert "nv_runtime_cache_path" not in provider_options(RTX, graph, manifest.base, profile)
