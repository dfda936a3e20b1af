"""The demo's engine: the base compiled by TensorRT-RTX, where that package is installed, for this GPU or another."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from adalink.runtime.errors import BackendError
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from examples.demo import Progress

_BACKEND = "tensorrt-rtx"
_MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
_ELSEWHERE = "sm86"


def build_engine(path: Path, source: Path, progress: Progress) -> bool:
    """Add an engine to the demo's deployment, unless the same is there already.

    Args:
        path: the deployment.
        source: the model.
        progress: called with a line at each step.

    Returns:
        Whether there is an engine for a GPU of this machine.
    """
    from adalink.export.base.export import export_base
    from adalink.export.engine.export import export_engine
    from adalink.runtime.device.gpus import find_gpus
    from adalink.runtime.trt.record import read_record

    if not any(importlib.util.find_spec(name) for name in _MODULES):
        progress("engine: TensorRT-RTX is not installed, so none is built; 'make demo TRT=1' installs it")
        return False
    gpus = find_gpus()
    target = "current" if gpus.devices else _ELSEWHERE
    manifest = read_manifest(path)
    if _is_built(path, manifest, target):
        progress(f"engine: built before for {target} from the same base by the same version, reused")
        return bool(gpus.devices)
    if "portable" not in manifest.variants:
        manifest = export_base(
            source, path, target="portable", progress=lambda line: progress(f"engine, its portable graph: {line}")
        )
    progress(f"engine: building it with TensorRT-RTX for {target}")
    try:
        manifest = export_engine(path, _BACKEND, target=(target,), replace=True)
    except BackendError as error:
        if not gpus.devices:
            raise
        progress(f"engine: not built for {gpus.devices[0].name}: {error}")
        return False
    record = read_record((path / manifest.variants[_BACKEND].graph).parent)
    progress(
        f"engine: {record.plan_bytes / 1e6:.1f} MB in {record.build_seconds:.1f} s, and {len(record.embedders)} "
        "embedders that adapt its input for every task"
    )
    if not gpus.devices:
        progress(f"engine: built, not run: {gpus.reason}")
    return bool(gpus.devices)


def _is_built(path: Path, manifest: Manifest, target: str) -> bool:
    """Whether the engine in a deployment is what would be built now."""
    from adalink.runtime.trt.api import load_api
    from adalink.runtime.trt.record import read_record

    built, base = manifest.variants.get(_BACKEND), manifest.variants.get("portable")
    if built is None or base is None:
        return False
    record = read_record((path / built.graph).parent)
    held = {manifest.files[file].sha256 for file in base.files}
    is_same = {record.onnx_sha256, record.weights_sha256} <= held and record.target == (target,)
    return is_same and record.version == load_api(_BACKEND).version
