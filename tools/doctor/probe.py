"""Probe of one backend in a separate process: a broken driver may crash the probe, never ``adalink doctor``.

``python -m adalink.tools.doctor.probe NAME`` prints one JSON line ``{"works": bool, "detail": str, "advice": str}``;
for the name ``gpus`` it prints the GPUs and the driver.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from adalink.tools.common.child_process import child_environment, python_command

# An ONNX model of one node, y = -x with x of shape (1,), so that a probe needs no onnx package.
_NEGATE = bytes.fromhex(
    "08083a360a0b0a017812017922034e6567120570726f62655a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a00100d"
)
_TIMEOUT_SECONDS = 120


class Finding(NamedTuple):
    """Result of a probe.

    Attributes:
        works: whether a deployment can run on it here.
        detail: what the probe measured.
        advice: what to do about it; empty where the package is what is missing, or nothing is.
    """

    works: bool
    detail: str
    advice: str = ""


def probe(name: str) -> Finding:
    """Try a backend in a fresh process."""
    answer = _ask(name)
    return Finding(False, answer) if isinstance(answer, str) else Finding(**answer)


def probe_gpus() -> dict[str, object]:
    """GPUs and driver, asked in a fresh process: ``{"devices": [...], "driver": ..., "reason": ...}``."""
    answer = _ask("gpus")
    return {"devices": [], "driver": None, "reason": answer} if isinstance(answer, str) else answer


def _ask(name: str) -> dict[str, Any] | str:
    """Output of the probe of ``name``, or the reason why there is none."""
    try:
        done = subprocess.run(
            python_command(module="adalink.tools.doctor.probe", arguments=(name,)),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env=child_environment(ORT_LOGGING_LEVEL="4"),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT_SECONDS} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the probe ended with code {done.returncode}: {cause}"
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _onnxruntime(provider: str) -> Finding:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    version = f"onnxruntime {onnxruntime.__version__}"
    if provider not in providers:
        return Finding(False, f"{version} is built without {provider}; it has {', '.join(providers)}")
    session = onnxruntime.InferenceSession(_NEGATE, providers=[provider])
    if provider not in session.get_providers():
        used = ", ".join(session.get_providers())
        advice = "update the NVIDIA driver, and install the CUDA and TensorRT libraries that this version wants"
        return Finding(False, f"{version} lists {provider}, but a session falls back to {used}", advice)
    return _compute(session, f"{version} on {provider}")


def _plugin() -> Finding:
    """TensorRT-RTX inside ONNX Runtime, which comes as a plugin."""
    import onnxruntime

    plugin = import_module("onnxruntime_ep_nv_tensorrt_rtx")
    version, name = f"onnxruntime {onnxruntime.__version__}", plugin.get_ep_name()
    onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        advice = "install the NVIDIA driver, on a machine with an RTX GPU"
        return Finding(False, f"{version} registers {name}, which finds no GPU that it supports", advice)
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices(devices[:1], {})
    return _compute(onnxruntime.InferenceSession(_NEGATE, options), f"{version} on {name}")


def _compute(session: Any, where: str) -> Finding:
    import numpy as np

    (result,) = session.run(None, {"x": np.array([2.5], np.float32)})
    if result.tolist() != [-2.5]:
        return Finding(False, f"{where} computed -(2.5) = {result.tolist()}")
    return Finding(True, f"{where} computes")


def _tensorrt(backend: str) -> Finding:
    from adalink.runtime.errors import BackendError
    from adalink.tools.doctor.probe_tensorrt import try_tensorrt

    try:
        return Finding(*try_tensorrt(backend))
    except BackendError as error:
        return Finding(False, str(error))


def _llama_cpp() -> Finding:
    from adalink.runtime.errors import BackendError
    from adalink.runtime.llama_cpp.library import open_library

    try:
        library = open_library()
    except BackendError as error:
        return Finding(False, str(error))
    gpu = "with layers on a GPU" if library.llama_supports_gpu_offload() else "on the CPU"
    return Finding(True, f"llama.cpp {library.llama_version().decode()}, {gpu}: its structures are as expected")


PROBES: dict[str, Callable[[], Finding]] = {
    "onnxruntime-cpu": lambda: _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": lambda: _onnxruntime("CUDAExecutionProvider"),
    "onnxruntime-tensorrt": lambda: _onnxruntime("TensorrtExecutionProvider"),
    "onnxruntime-tensorrt-rtx": _plugin,
    "tensorrt": lambda: _tensorrt("tensorrt"),
    "tensorrt-rtx": lambda: _tensorrt("tensorrt-rtx"),
    "llama.cpp": _llama_cpp,
}


def _main(name: str) -> None:
    if name == "gpus":
        from dataclasses import asdict

        from adalink.runtime.device.gpus import find_gpus

        print(json.dumps(asdict(find_gpus())))
        return
    try:
        finding = PROBES[name]()
    except ModuleNotFoundError as error:
        finding = Finding(False, f"the package {error.name} is not installed")
    except Exception as error:  # whatever a vendor's library raises is the finding
        finding = Finding(False, f"{type(error).__name__}: {error}")
    print(json.dumps(finding._asdict()))


if __name__ == "__main__":
    _main(sys.argv[1])
