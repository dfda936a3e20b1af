"""A plan of TensorRT or TensorRT-RTX: built, opened on this GPU, compared with PyTorch, timed."""

from __future__ import annotations

from importlib.util import find_spec

from adalink.export.engine.export import export_engine
from adalink.runtime.backends import open_backend
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import BackendUnavailableError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.trt.api import TENSORRT_BACKENDS, load_api
from adalink.runtime.trt.record import read_record
from benchmarks.gpu_proof.case import Case
from benchmarks.gpu_proof.compare import compare_with_pytorch
from benchmarks.gpu_proof.ort import PROFILE
from benchmarks.gpu_proof.record import NotHereError, Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.swap import device_swap

_SMALL_PROFILE = "batch=1:8:32,seq=1:32:128,past=0:64:255"


def describe_library(record: Record, backend: str) -> None:
    """The library and its targets; raises ``NotHereError`` where it is not installed."""
    modules, extra = TENSORRT_BACKENDS[backend]
    if not any(find_spec(module) for module in modules):
        raise NotHereError(f"none of {', '.join(modules)} is installed (extra {extra})")
    api = load_api(backend)
    record.figures({"version": api.version, "targets": list(api.targets)})
    record.figure("gpus", [f"{gpu.name} {gpu.capability}" for gpu in find_gpus().devices])


def try_plan(record: Record, plan: Plan, backend: str, dtype: str, target: str, share: float) -> None:
    """Build for ``target``, open, compare and time; in a rehearsal the driver's absence is what opening says."""
    folder = plan.deployment(dtype)
    profile = PROFILE if plan.is_full else _SMALL_PROFILE
    manifest = export_engine(folder, backend, target=(target,), profile=profile, replace=True)
    variant = manifest.variants[backend]
    built = read_record((folder / variant.graph).parent)
    record.figures(
        {
            "built_for": list(built.target),
            "build_seconds": built.build_seconds,
            "plan_bytes": built.plan_bytes,
            "engine_bytes": manifest.size_bytes(variant.files),
            "cache": built.cache,
        }
    )
    try:
        case = Case(record, plan, folder, open_backend(backend))
    except BackendUnavailableError as error:
        if plan.has_gpu:
            raise
        record.figure("opening", str(error))
        assert backend in read_manifest(folder).variants
        return
    with case.deployment as deployment:
        from adalink.runtime.device.cuda import CudaDevice

        compare_with_pytorch(record, plan, deployment, plan.small)
        case.mixed_answers(8)
        case.decode(1, 0.3 * share)
        case.swaps(0.5 * share, device_swap(deployment, CudaDevice(backend)))
        case.decode(32, 0.5 * share)
        case.first_token(0.5 * share)
        case.receipt()
