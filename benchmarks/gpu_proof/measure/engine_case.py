"""A plan of TensorRT or TensorRT-RTX: built, opened on this GPU, compared with PyTorch, timed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from adalink.export.engine.export import export_engine
from adalink.runtime.backends import open_backend
from adalink.runtime.device.cuda import CudaDevice
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.device.protocols import Device
from adalink.runtime.engine import Backend
from adalink.runtime.errors import BackendUnavailableError
from adalink.runtime.trt.api import TENSORRT_BACKENDS, load_api
from adalink.runtime.trt.record import read_record
from benchmarks.gpu_proof.measure.case import Case
from benchmarks.gpu_proof.measure.compare import compare_with_pytorch
from benchmarks.gpu_proof.measure.ort import PROFILE
from benchmarks.gpu_proof.measure.swap import device_swap
from benchmarks.gpu_proof.record import NotHereError, Record
from benchmarks.gpu_proof.step import Plan

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
        opened, device = open_backend(backend), CudaDevice(backend)
    except BackendUnavailableError as error:
        if plan.has_gpu:
            raise
        record.figure("opening", str(error))
        return
    run_plan(record, plan, folder, (opened, device), share)


def run_plan(record: Record, plan: Plan, folder: Path, engine: tuple[Backend, Device], share: float) -> None:
    """Open, compare with PyTorch and time.

    Args:
        record: gets the figures.
        plan: what the step was told.
        folder: the deployment.
        engine: the backend, and a device for a pool of weights of its own.
        share: of the time that is left.
    """
    backend, device = engine
    case = Case(record, plan, folder, backend)
    with case.deployment as deployment:
        compare_with_pytorch(record, plan, deployment, plan.small)
        case.mixed_answers(8)
        case.decode(1, 0.3 * share)
        case.swaps(0.5 * share, device_swap(deployment, device))
        case.decode(32, 0.5 * share)
        case.first_token(0.5 * share)
        case.receipt()
