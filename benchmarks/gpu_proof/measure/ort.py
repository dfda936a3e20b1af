"""ONNX Runtime's providers on a GPU as the kit opens them, with a profile that takes 32 rows."""

from __future__ import annotations

from adalink.runtime.backends import open_backend
from adalink.runtime.engine import Backend
from adalink.runtime.ort.gpu_backend import OnnxRuntimeGpuBackend
from adalink.runtime.profile import Profile, parse_profile
from adalink.runtime.storage.manifest import Base
from benchmarks.gpu_proof.step import Plan

PROFILE = "batch=1:8:32,seq=1:128:1024,past=0:512:2047"
_CPU = "onnxruntime-cpu"


class WideBackend(OnnxRuntimeGpuBackend):
    """The kit's backend; its engines take ``PROFILE``."""

    def profile_of(self, base: Base) -> Profile:
        """See ``OnnxRuntimeGpuBackend``."""
        return parse_profile(PROFILE, base)


def wide_backend(name: str, plan: Plan) -> Backend:
    """The backend, or in a rehearsal the CPU's."""
    return WideBackend(name) if plan.has_gpu else open_backend(_CPU)


def stand_in(name: str, plan: Plan) -> str:
    """The backend's name, or in a rehearsal the CPU's."""
    return name if plan.has_gpu else _CPU
