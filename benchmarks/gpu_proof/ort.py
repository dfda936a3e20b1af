"""ONNX Runtime's CUDA provider as the kit opens it, with a profile that takes 32 rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adalink.runtime.backends import open_backend
from adalink.runtime.engine import Backend
from adalink.runtime.profile import parse_profile
from adalink.runtime.storage.manifest import Base
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
