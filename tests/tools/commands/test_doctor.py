"""`adalink doctor` tries backends for real, and a broken one is reported, not fatal."""

import json
import os
import re
import shutil
import subprocess
import sys

import onnxruntime
import pytest
from click.testing import CliRunner

from adalink.runtime.backends import BACKENDS
from adalink.runtime.device.gpus import find_gpus
from adalink.tools.cli import main
from adalink.tools.commands.doctor import BACKEND_EXTRAS
from adalink.tools.doctor import probe as probe_module
from adalink.tools.doctor.probe import PROBES, probe, probe_gpus


def test_every_backend_has_a_probe():
    assert BACKEND_EXTRAS.keys() == PROBES.keys() == set(BACKENDS)


def test_findings_agree_with_onnxruntime_itself():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)
    assert findings["backends"]["onnxruntime-cpu"]["works"] is True
    assert onnxruntime.__version__ in findings["backends"]["onnxruntime-cpu"]["detail"]
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if not has_cuda:
        assert findings["backends"]["onnxruntime-cuda"]["works"] is False
        assert "adalink-kit[gpu]" in findings["backends"]["onnxruntime-cuda"]["install"]
    assert findings["environment"]["python"] == sys.version.split()[0]


def test_missing_package_is_named(monkeypatch, tmp_path):
    """An onnxruntime that cannot be imported: the finding names the package."""
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('no', name='onnxruntime')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe("onnxruntime-cpu") == (False, "the package onnxruntime is not installed", "")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import os\nos.abort()", "ended with code -6"),
        ("raise RuntimeError('libcudart.so.13 is missing')", "libcudart.so.13 is missing"),
    ],
)
def test_crashing_backend_is_a_finding(monkeypatch, tmp_path, body, expected):
    (tmp_path / "onnxruntime.py").write_text(body + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    works, detail, _ = probe("onnxruntime-cpu")
    assert not works
    assert expected in detail


def test_hanging_backend_is_a_finding(monkeypatch, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe_module, "_TIMEOUT_SECONDS", 1)
    works, detail, _ = probe("onnxruntime-cpu")
    assert not works
    assert "no answer" in detail


@pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU")
def test_tensorrt_rtx_builds_without_a_gpu_and_says_what_is_missing():
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    works, detail, advice = probe("tensorrt-rtx")
    assert not works
    assert "builds engines (sm86 was tried), but runs none: " in detail
    assert "driver" in detail or "device" in detail
    assert "install the NVIDIA driver" in advice
    assert "adalink export engine --target" in advice
    shown = CliRunner().invoke(main, ["doctor"]).stdout
    assert "gpus" in shown
    assert "none: " in shown


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_with_a_gpu_a_backend_computes_or_says_why_not(name):
    found = find_gpus()
    if not found.devices:
        pytest.skip(found.reason)
    works, detail, advice = probe(name)
    assert works or advice or "is not installed" in detail or "is built without" in detail or "is absent" in detail
    if works and name.startswith("tensorrt"):
        assert found.devices[0].name in detail
    assert found.devices[0].capability in CliRunner().invoke(main, ["doctor"]).stdout


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file')",
            r"does not load .ImportError: libnvi",
        ),
        ("raise ModuleNotFoundError('no', name='numpy')", r"does not load .ModuleNotFoundError"),
        ("__version__ = '9.3.0'", r"version 9.3.0 is installed, expected 10.0 or later and before 12.0"),
        ("__version__ = 'new'", r"version new is installed, expected 10.0 or later"),
        ("import os\nos.abort()", r"ended with code -6"),
    ],
)
def test_broken_tensorrt_is_a_finding_with_a_repair(monkeypatch, tmp_path, body, expected):
    """A package that does not load, or of another version: the backend's own error says so."""
    (tmp_path / "tensorrt.py").write_text(body + "\n")
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), inherited])))
    works, detail, _ = probe("tensorrt")
    assert not works
    assert re.search(expected, detail)


def test_a_driver_that_refuses_is_no_gpu(monkeypatch, tmp_path):
    """A library of the driver's name that cannot start: the reason is told, and nothing crashes."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "cuda.c").write_text("int cuInit(unsigned flags) { return 999; }\n")
    subprocess.run([compiler, "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert probe_gpus() == {
        "devices": [],
        "driver": None,
        "reason": "the NVIDIA driver refuses to start (cuInit gave 999)",
    }


def test_gpus_are_described_as_the_driver_does(monkeypatch, tmp_path):
    """A driver of one known device, in C: name, capability, memory and version come through."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "cuda.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "cuda.c"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert probe_gpus() == {
        "devices": [{"name": "A GPU", "capability": "sm86", "memory_bytes": 12_000_000_000}],
        "driver": "13.1",
        "reason": "",
    }


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = 7; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, device == 7 ? "A GPU" : "?", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 12000000000u; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 6; return 0; }
"""


WRONG = """
import numpy as np
__version__ = "1.99"
def get_available_providers():
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers):
        self.providers = providers
    def get_providers(self):
        return {found}
    def run(self, outputs, feeds):
        return [{factor} * feeds["x"]]
"""


@pytest.mark.parametrize(
    ("found", "factor", "works", "detail"),
    [
        ("self.providers", "-1", True, "onnxruntime 1.99 on CUDAExecutionProvider computes"),
        ("self.providers", "1", False, "onnxruntime 1.99 on CUDAExecutionProvider computed -(2.5) = [2.5]"),
        (
            '["CPUExecutionProvider"]',
            "-1",
            False,
            "onnxruntime 1.99 lists CUDAExecutionProvider, but a session falls back to CPUExecutionProvider",
        ),
    ],
)
def test_a_backend_that_computes_wrongly_or_elsewhere_is_a_finding(monkeypatch, tmp_path, found, factor, works, detail):
    (tmp_path / "onnxruntime.py").write_text(WRONG.format(found=found, factor=factor))
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), inherited])))
    assert probe("onnxruntime-cuda")[:2] == (works, detail)


PLUGIN = """
from types import SimpleNamespace
import numpy as np
__version__ = "1.99"
def register_execution_provider_library(name, path):
    assert (name, path) == ("RTX", "librtx.so")
def get_ep_devices():
    return [SimpleNamespace(ep_name=name) for name in {devices}]
class SessionOptions:
    def add_provider_for_devices(self, devices, options):
        assert [device.ep_name for device in devices] == ["RTX"]
class InferenceSession:
    def __init__(self, model, options):
        pass
    def run(self, outputs, feeds):
        return [-feeds["x"]]
"""


@pytest.mark.parametrize(
    ("devices", "works", "detail"),
    [
        (["CPU", "RTX", "RTX"], True, "onnxruntime 1.99 on RTX computes"),
        (["CPU"], False, "onnxruntime 1.99 registers RTX, which finds no GPU that it supports"),
    ],
)
def test_a_plugin_without_a_gpu_is_a_finding(monkeypatch, tmp_path, devices, works, detail):
    (tmp_path / "onnxruntime.py").write_text(PLUGIN.format(devices=devices))
    package = "def get_ep_name():\n    return 'RTX'\ndef get_library_path():\n    return 'librtx.so'\n"
    (tmp_path / "onnxruntime_ep_nv_tensorrt_rtx.py").write_text(package)
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), inherited])))
    found = probe("onnxruntime-tensorrt-rtx")
    assert found[:2] == (works, detail)
    assert bool(found.advice) == (not works)
