"""`adalink doctor` tries backends for real, and a broken one is reported, not fatal."""

import json
import sys

import onnxruntime
import pytest
from click.testing import CliRunner

from adalink.tools import probe as probe_module
from adalink.tools.cli import main
from adalink.tools.doctor import BACKEND_EXTRAS
from adalink.tools.probe import PROBES, probe


def test_every_backend_has_a_probe():
    assert BACKEND_EXTRAS.keys() == PROBES.keys()


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
    assert probe("onnxruntime-cpu") == (False, "the package onnxruntime is not installed")


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
    works, detail = probe("onnxruntime-cpu")
    assert not works
    assert expected in detail


def test_hanging_backend_is_a_finding(monkeypatch, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe_module, "_TIMEOUT_SECONDS", 1)
    works, detail = probe("onnxruntime-cpu")
    assert not works
    assert "no answer" in detail
