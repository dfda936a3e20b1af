"""Description of a compiled engine: its record, its header, and its contents where a GPU can load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins
from msgspec.structs import asdict

from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import BackendError, DeploymentError
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.manifest import MANIFEST_FILE, Manifest, Variant
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.trt.api import Api, load_api
from adalink.runtime.trt.record import PLAN_FILE, RECORD_FILE, VISION_FILE, EngineRecord, read_record

if TYPE_CHECKING:
    from adalink.tools.commands.inspect import Description

_HEADER_BYTES = 4096


def describe_plan(path: Path) -> Description:
    """Describe one plan; raises ``DeploymentError`` if there is no such file."""
    if not path.is_file():
        raise DeploymentError(f"{path}: no such file; a deployment's plans lie in engines/<name>/")
    record = read_record(path.parent) if (path.parent / RECORD_FILE).is_file() else None
    digest = digest_file(path)
    described: Description = {"kind": "plan", "role": _role(path.name, record), "size_bytes": path.stat().st_size}
    described["sha256"] = digest
    if record is None:
        return {**described, "record": f"there is no {RECORD_FILE} beside it", "contents": _NOT_OURS}
    described["record"] = _describe_record(record)
    try:
        api = load_api(record.backend)
    except BackendError as error:
        return {**described, "header": f"not read: {error}", "contents": "not read: the library is not installed"}
    described["header"] = _describe_header(api, path)
    described["contents"] = _describe_contents(api, path, digest)
    return described


def describe_engine(folder: Path, manifest: Manifest, variant: Variant) -> Description:
    """Describe a compiled variant of a deployment by its record; raises ``DeploymentError``."""
    record = read_record((folder / variant.graph).parent)
    described = _describe_record(record)
    described["built_from_what_is_there"] = _is_of_this_base(record, manifest)
    return described


def _describe_record(record: EngineRecord) -> Description:
    described: dict[str, Any] = asdict(record)
    described["target"] = list(record.target)
    described["profile"] = str(record.profile)
    described["fronts"] = sorted(record.embedders)
    described["tasks"] = sorted(record.tasks)
    described["vision"] = to_builtins(record.vision)
    return described


def _is_of_this_base(record: EngineRecord, manifest: Manifest) -> bool:
    """Whether the deployment still has the variant and the vision tower that an engine was built from."""
    source = manifest.variants.get(record.variant)
    if source is None:
        return False
    tower = manifest.base.vision.files if manifest.base.vision else ()
    held = {manifest.files[path].sha256 for path in (*source.files, *tower)}
    built_from = {record.onnx_sha256, record.weights_sha256}
    if record.vision is not None:
        built_from |= {record.vision.onnx_sha256, record.vision.weights_sha256}
    return built_from <= held


def _role(name: str, record: EngineRecord | None) -> str:
    if name == PLAN_FILE:
        return "base"
    if record is None:
        return "unknown"
    if name == VISION_FILE:
        return "vision tower"
    for embedder, file in record.embedders.items():
        if name == file:
            return f"front {embedder}"
    return next((f"task {task}" for task, file in record.tasks.items() if name == file), "unknown")


def _describe_header(api: Api, path: Path) -> str:
    with path.open("rb") as stream:
        verdict = api.validity(stream.read(_HEADER_BYTES))
    if verdict is None:
        return f"{api.backend} {api.version} cannot tell"
    state, reasons = verdict
    if state == "invalid" and not reasons and not find_gpus().devices:
        return f"well-formed for {api.backend} {api.version}; whether it runs is for a GPU to say"
    return f"{state} for {api.backend} {api.version}" + (f": {', '.join(reasons)}" if reasons else "")


_NOT_OURS = "not loaded: a plan is code, and only one whose digest is in a deployment's manifest is loaded"


def _describe_contents(api: Api, path: Path, digest: str) -> Description | str:
    """Inputs and outputs with their ranges, where that is safe and possible."""
    if not _is_in_manifest(path, digest):
        return _NOT_OURS
    gpus = find_gpus()
    if not gpus.devices:
        return f"not loaded: that takes a GPU, and {gpus.reason}"
    runtime = api.make_runtime()
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        return str(api.error("not loaded", "build it again for this GPU"))
    tensors: Description = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode, kind = engine.get_tensor_mode(name).name.lower(), engine.get_tensor_dtype(name).name.lower()
        text = f"{mode} {kind} {tuple(engine.get_tensor_shape(name))}"
        if mode == "input":
            ranges = [engine.get_tensor_profile_shape(name, at) for at in range(engine.num_optimization_profiles)]
            text += "".join(f"; {tuple(low)} to {tuple(high)}" for low, _, high in ranges)
        tensors[name] = text
    return tensors


def _is_in_manifest(path: Path, digest: str) -> bool:
    """Whether the deployment around a plan records it with this digest."""
    path = path.resolve()
    for folder in path.parents:
        if (folder / MANIFEST_FILE).is_file():
            try:
                held = read_manifest(folder).files.get(path.relative_to(folder).as_posix())
            except DeploymentError:
                return False
            return held is not None and held.sha256 == digest
    return False
