"""Backends by name. Only this module imports the code of ONNX Runtime, TensorRT, llama.cpp and devices, on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.runtime.errors import BackendUnavailableError, RequestError
from adalink.runtime.near_names import did_you_mean

if TYPE_CHECKING:
    from adalink.runtime.engine import Backend

BACKENDS = (
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
    "llama.cpp",
)


def check_backend(name: str) -> None:
    """Check that there is a backend of that name; raises ``BackendUnavailableError``."""
    if name not in BACKENDS:
        raise BackendUnavailableError(
            f"backend {name!r} is not known: expected one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}"
        )


def open_backend(name: str, threads: int | None = None, gpu_layers: int | None = None) -> Backend:
    """Backend by name.

    Args:
        name: one of ``BACKENDS``.
        threads: threads of the engine; all physical cores by default.
        gpu_layers: layers whose weights llama.cpp puts on a GPU; none by default.

    Raises:
        BackendUnavailableError: there is no such backend, or its package or device is not on this machine.
        RequestError: ``threads`` or ``gpu_layers`` is given for a backend that has none.
    """
    check_backend(name)
    if name == "llama.cpp":
        from adalink.runtime.llama_cpp.backend import LlamaCppBackend
        from adalink.runtime.ort.backend import OnnxRuntimeBackend

        return LlamaCppBackend(name, threads, gpu_layers or 0, OnnxRuntimeBackend("onnxruntime-cpu", 1).open_bank)
    if gpu_layers is not None:
        raise RequestError(f"gpu_layers is {gpu_layers}, but only llama.cpp puts layers on a GPU: leave it out")
    if name == "onnxruntime-cpu":
        from adalink.runtime.ort.backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(name, threads)
    if threads is not None:
        raise RequestError(f"threads is {threads}, but {name} computes on a GPU: leave it out")
    if name.startswith("onnxruntime-"):
        from adalink.runtime.ort.gpu_backend import OnnxRuntimeGpuBackend

        return OnnxRuntimeGpuBackend(name)
    from adalink.runtime.ort.vision import OnnxVisionGraph
    from adalink.runtime.trt.backend import TensorRtBackend

    return TensorRtBackend(name, OnnxVisionGraph)
