"""Opening TensorRT-RTX engines that were really built: everything up to the driver runs here, where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from helpers.engines import RTX
from helpers.runtime import Tiny, build, reseal

from adalink.export.base.export import export_base
from adalink.export.engine.export import export_engine
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import (
    BackendError,
    BackendUnavailableError,
    ContractError,
    DeploymentError,
    IntegrityError,
    RequestError,
)
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.trt.api import load_api
from adalink.runtime.trt.record import read_record

PROFILE = Profile(batch=ShapeRange(1, 1, 2), seq=ShapeRange(1, 4, 8), past=ShapeRange(0, 8, 31))
without_gpu = pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU: the engine would simply open")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = build("llama", tmp_path_factory.mktemp("engine"))
    export_base(tiny.model, tiny.folder, target="portable")
    export_engine(tiny.folder, RTX, target=("sm86",), profile=PROFILE)
    return tiny


@pytest.fixture
def copy(built: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.folder, tmp_path / "deployment"))


def engine_of(folder: Path) -> Path:
    return folder / "engines" / RTX


@without_gpu
def test_without_a_driver_the_error_says_so(built: Tiny) -> None:
    with pytest.raises(BackendUnavailableError, match=r"backend tensorrt-rtx needs an NVIDIA GPU.*driver.*doctor"):
        Deployment.open(built.folder, RTX)


@without_gpu
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_providers_that_are_not_here_say_what_to_install(built: Tiny, name: str) -> None:
    with pytest.raises(BackendUnavailableError, match=rf"backend {name} needs .*pip install"):
        Deployment.open(built.folder, name)


def test_a_plan_is_read_whole_each_time(copy: Path) -> None:
    """A plan that was altered with its time stamps put back is found, though it was seen before."""
    import os

    plan = engine_of(copy) / "engine.plan"
    with pytest.raises(BackendUnavailableError) if not find_gpus().devices else pytest.raises(RequestError):
        Deployment.open(copy, RTX)
        raise RequestError("it opened")
    stamps = plan.stat()
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    os.utime(plan, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    with pytest.raises(IntegrityError, match=r"engine\.plan has digest .* it was altered"):
        Deployment.open(copy, RTX)


@pytest.mark.parametrize("name", ["engine.plan", "engine.json", "front-gelu-ids.plan"])
def test_missing_and_truncated_files_are_named(copy: Path, name: str) -> None:
    path = engine_of(copy) / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Deployment.open(copy, RTX)
    path.unlink()
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Deployment.open(copy, RTX)


def test_an_engine_of_another_version_is_refused(copy: Path) -> None:
    path = engine_of(copy) / "engine.json"
    record = msgspec.structs.replace(read_record(path.parent), version="1.2.0.54")
    path.write_bytes(msgspec.json.encode(record))
    reseal(copy)
    with pytest.raises(BackendError, match=r"built by tensorrt-rtx 1\.2\.0\.54, installed is .*--replace"):
        Deployment.open(copy, RTX)


def test_an_engine_of_the_other_toolkit_is_refused(copy: Path) -> None:
    path = engine_of(copy) / "engine.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(read_record(path.parent), backend="tensorrt")))
    reseal(copy)
    with pytest.raises(DeploymentError, match="built for tensorrt, not for tensorrt-rtx"):
        Deployment.open(copy, RTX)


@pytest.mark.parametrize("data", [b"{", b'{"backend": 3}', b"\xff"])
def test_a_damaged_record_is_an_error_of_its_own(copy: Path, data: bytes) -> None:
    (engine_of(copy) / "engine.json").write_bytes(data)
    reseal(copy)
    with pytest.raises(DeploymentError, match=r"engine\.json: .*build the engine again"):
        Deployment.open(copy, RTX)


def test_what_is_no_plan_is_refused_by_its_header(copy: Path) -> None:
    """The library's own verdict; the record is made to say nothing wrong."""
    plan = engine_of(copy) / "engine.plan"
    header = bytearray(plan.read_bytes())
    api = load_api(RTX)
    header[:8] = bytes(8)
    plan.write_bytes(header)
    reseal(copy)
    verdict = api.validity(plan.read_bytes())
    assert verdict == ("invalid", ("malformed engine",))
    with pytest.raises(BackendError, match="refuses it on this machine: malformed engine"):
        Deployment.open(copy, RTX)


def test_there_is_no_engine_for_a_deployment_that_has_none(built: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.folder, tmp_path / "plain"))
    manifest = read_manifest(folder)
    reseal(folder, variants={name: own for name, own in manifest.variants.items() if not own.is_compiled})
    with pytest.raises(BackendError, match=r"no engine for tensorrt-rtx.*adalink export engine DIR --backend"):
        Deployment.open(folder, RTX)


def test_threads_are_not_for_gpus(built: Tiny) -> None:
    with pytest.raises(RequestError, match="threads is 2, but tensorrt-rtx computes on a GPU"):
        Deployment.open(built.folder, RTX, threads=2)


def test_a_second_role_is_refused(built: Tiny) -> None:
    from adalink.runtime.backends import open_backend
    from adalink.runtime.trt.backend import TensorRtBackend

    backend = open_backend(RTX)
    assert isinstance(backend, TensorRtBackend)
    manifest = read_manifest(built.folder)
    with pytest.raises(ContractError, match="encoder-decoder"):
        backend.open_engine(built.folder / manifest.variants[RTX].graph, manifest.base, "decoder", None)
