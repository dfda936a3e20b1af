"""ONNX Runtime's CUDA provider as the kit opens it, with a profile that takes 32 rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.profile import parse_profile
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.registry import TaskRegistry
from benchmarks.gpu_proof.step import Plan

PROFILE = "batch=1:8:32,seq=1:128:1024,past=0:512:2047"
CPU = "onnxruntime-cpu"


def stand_in(backend: str, plan: Plan) -> str:
    """The backend, or the CPU's in a rehearsal."""
    return backend if plan.has_gpu else CPU


@contextmanager
def wide_backend(name: str) -> Iterator[Backend]:
    """The backend; while the block runs, engines of ONNX Runtime on a GPU open with ``PROFILE``."""
    from adalink.runtime.ort import gpu_backend

    right = gpu_backend.default_profile

    def wide(base: Base) -> object:
        return parse_profile(PROFILE, base)

    gpu_backend.default_profile = wide  # type: ignore[assignment]
    try:
        yield open_backend(name)
    finally:
        gpu_backend.default_profile = right


def host_swap(deployment: Deployment, backend: str) -> Callable[[int], object]:
    """A swap where adapters are applied in main memory: from a task's name to what a batch goes through."""
    tasks = TaskRegistry(Path(deployment.path), deployment.manifest, open_backend(backend))
    names = deployment.tasks
    for name in names:
        tasks.resolve(name, 1)
    return lambda index: tasks.resolve(names[index % len(names)], 1)
