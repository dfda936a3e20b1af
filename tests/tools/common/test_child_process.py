"""Children of the kit take no module from the current folder, whatever lies there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import make_deployment

from adalink.tools.bench.startup import import_seconds
from adalink.tools.common import child_process
from adalink.tools.common.child_process import child_environment, python_command
from adalink.tools.doctor.probe import probe, probe_gpus
from adalink.tools.parity.checks.swap_worker import run_fresh

STRAYS = ("onnxruntime", "hashlib", "json", "numpy", "click")
PACKAGES = ("runtime", "training", "export", "tools")


@pytest.fixture
def strays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The current folder holds modules of others' names; gives the names of those that were run."""
    folder = tmp_path / "current"
    folder.mkdir()
    for name in STRAYS:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / name)!r} + '.run', 'w').close()\nraise SystemExit(3)\n"
        )
    monkeypatch.chdir(folder)
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]  # noqa: PTH100
    # An empty entry is what "PYTHONPATH=$PYTHONPATH:..." leaves: it means the current folder.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", *paths, str(REPOSITORY / "src")]))
    return lambda: sorted(path.stem for path in tmp_path.glob("*.run"))


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `adalink verify` asks a fresh process."""
    folder = make_deployment(tmp_path_factory.mktemp("swap"), "llama", {})[1]
    return {
        "path": str(folder), "backend": "onnxruntime-cpu", "variant": None, "threads": 1, "ids": [[1, 2]],
        "decoder_ids": None, "tasks": [None],
    }  # fmt: skip


def test_strays_would_be_run_by_a_plain_child(strays: Callable[[], list[str]]) -> None:
    subprocess.run([sys.executable, "-c", "import hashlib"], check=False)
    assert strays() == ["hashlib"]


def test_doctor_runs_no_module_of_the_current_folder(strays: Callable[[], list[str]]) -> None:
    finding = probe("onnxruntime-cpu")
    assert (finding.works, strays()) == (True, []), finding
    assert probe_gpus()["reason"] is None or "the probe ended" not in str(probe_gpus()["reason"])
    assert strays() == []


def test_bench_runs_no_module_of_the_current_folder(strays: Callable[[], list[str]]) -> None:
    assert import_seconds(repeats=1) > 0
    assert strays() == []


def test_verify_runs_no_module_of_the_current_folder(
    request_of: dict[str, Any], strays: Callable[[], list[str]]
) -> None:
    assert len(run_fresh(request_of)["digests"]) == 1
    assert strays() == []


@pytest.mark.parametrize("as_module", [True, False])
def test_python_without_the_option_takes_no_module_either(
    strays: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, *, as_module: bool
) -> None:
    """What Python 3.10 is told, which has neither the option -P nor its environment variable."""
    monkeypatch.setattr(child_process, "HAS_SAFE_PATH", False)
    environment = {name: value for name, value in child_environment().items() if name != "PYTHONSAFEPATH"}
    if as_module:
        command = python_command(module="adalink.tools.doctor.probe", arguments=("onnxruntime-cpu",))
    else:
        command = python_command(code="import sys, hashlib, json, numpy\nprint(sys.argv[1:])", arguments=("works",))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, strays()) == (0, []), done.stderr
    assert "works" in done.stdout


def test_command_line_as_a_module_takes_no_module_from_the_current_folder(strays: Callable[[], list[str]]) -> None:
    environment = {**child_environment()}
    del environment["PYTHONSAFEPATH"]
    command = [sys.executable, "-m", "adalink.tools", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, strays()) == (0, []), done.stderr


def test_command_line_as_a_module_runs_from_its_own_folder() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "adalink.tools", "--version"]
    done = subprocess.run(command, cwd=REPOSITORY / "src", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_else_in_the_package_starts_python() -> None:
    starts = re.compile(r"sys\.executable|multiprocessing|runpy|os\.(?:exec|spawn|posix_spawn|system|popen)|shell=True")
    found = [
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if starts.search(path.read_text(encoding="utf-8"))
    ]
    assert found == ["tools/common/child_process.py"]
