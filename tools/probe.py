"""One real try of one backend, in a process of its own: a broken driver may crash the probe, never ``adalink doctor``.

``python -m adalink.tools.probe NAME`` prints one JSON line ``{"works": bool, "detail": str}``.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

# An ONNX model of one node, y = -x with x of shape (1,), so that a probe needs no onnx package.
_NEGATE = bytes.fromhex(
    "08083a360a0b0a017812017922034e6567120570726f62655a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a00100d"
)
_TIMEOUT_SECONDS = 120


def probe(name: str) -> tuple[bool, str]:
    """Try a backend in a fresh process.

    Returns:
        Whether it works, and what was seen.
    """
    environment = {**os.environ, "ORT_LOGGING_LEVEL": "4"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "adalink.tools.probe", name],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer in {_TIMEOUT_SECONDS} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return False, f"the probe ended with code {done.returncode}: {cause}"
    answer = json.loads(lines[-1])
    return bool(answer["works"]), str(answer["detail"])


def _onnxruntime(provider: str) -> tuple[bool, str]:
    import numpy as np
    import onnxruntime

    found = onnxruntime.get_available_providers()
    version = f"onnxruntime {onnxruntime.__version__}"
    if provider not in found:
        return False, f"{version} is built without {provider}; it has {', '.join(found)}"
    session = onnxruntime.InferenceSession(_NEGATE, providers=[provider])
    if provider not in session.get_providers():
        return False, f"{version} lists {provider}, but a session falls back to {', '.join(session.get_providers())}"
    (result,) = session.run(None, {"x": np.array([2.5], np.float32)})
    if result.tolist() != [-2.5]:
        return False, f"{version} on {provider} computed -(2.5) = {result.tolist()}"
    return True, f"{version}, a session on {provider} computes"


def _tensorrt(module_names: tuple[str, ...]) -> tuple[bool, str]:
    trt = next((module for module in map(_import_or_none, module_names) if module is not None), None)
    if trt is None:
        raise ModuleNotFoundError(f"No module named {module_names[0]!r}", name=module_names[0])
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    version = f"{trt.__name__} {trt.__version__}"
    if builder is None:
        return False, f"{version} cannot make a builder"
    count, reason = _count_gpus()
    if count == 0:
        return False, f"{version} makes a builder, but there is no GPU to run on: {reason}"
    return True, f"{version} makes a builder; {count} NVIDIA GPU(s)"


def _import_or_none(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def _count_gpus() -> tuple[int, str]:
    """Number of NVIDIA GPUs that the driver offers, and why there is none."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0, f"the NVIDIA driver ({library}) is not installed"
    if code := driver.cuInit(0):
        return 0, f"the NVIDIA driver refuses to start (cuInit gave {code})"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value, "the driver sees no device"


PROBES: dict[str, Callable[[], tuple[bool, str]]] = {
    "onnxruntime-cpu": lambda: _onnxruntime("CPUExecutionProvider"),
    "onnxruntime-cuda": lambda: _onnxruntime("CUDAExecutionProvider"),
    "tensorrt": lambda: _tensorrt(("tensorrt",)),
    "tensorrt-rtx": lambda: _tensorrt(("tensorrt_rtx", "tensorrt_rtx_bindings")),
}


def _main(name: str) -> None:
    try:
        works, detail = PROBES[name]()
    except ModuleNotFoundError as error:
        works, detail = False, f"the package {error.name} is not installed"
    except Exception as error:  # whatever a vendor's library raises is the finding
        works, detail = False, f"{type(error).__name__}: {error}"
    print(json.dumps({"works": works, "detail": detail}))


if __name__ == "__main__":
    _main(sys.argv[1])
