"""The whole command on the CPU: every step on its stand-in, with the same report as on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.host_device import HAS_TENSOR_SCATTER
from helpers.paths import REPOSITORY

from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.profile import parse_profile
from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.gpu_proof.measure.engine_case import run_plan
from benchmarks.gpu_proof.measure.front import FrontBackend
from benchmarks.gpu_proof.record import Record, read_json
from benchmarks.gpu_proof.schedule import STEPS
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.steps.device_engine import _SMALL_PROFILE

pytestmark = pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU: python -m benchmarks.gpu_proof")
ON_CPU = {"machine", "bases"}
MOST_SECONDS = 120


def rehearse(out: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The command's report and output."""
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--out", str(out), "--tiny", "--minutes", "6", *more]
    command += ["--work", str(out / "work")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    report = read_json(out / "gpu-proof.json")
    assert report is not None
    return report, done.stdout


def check_schema(report: dict[str, Any], tmp_path: Path) -> None:
    """Every step that ran has every field of a record, whatever its end."""
    fields = set(Record(tmp_path / "empty.json").content) | {"what", "seconds", "limit_seconds", "exit_code"}
    for name, step in report["steps"].items():
        if step["status"] not in ("skipped",):
            assert fields - {"figures"} <= step.keys(), name
            assert step["traceback"] == "", step["traceback"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """A short rehearsal: report, output and folder."""
    out = tmp_path_factory.mktemp("rehearsal")
    return *rehearse(out, "--rehearse", "--steps", "bases", "ort-speed"), out


def test_a_short_rehearsal_answers_no_device(rehearsed: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    report, output, out = rehearsed
    check_schema(report, tmp_path)
    steps = report["steps"]
    assert {name: steps[name]["status"] for name in ("bases", "ort-speed")} == {
        "bases": "passed",
        "ort-speed": "no device",
    }
    speed = steps["ort-speed"]
    assert speed["figures"] == {}
    assert speed["targets"] == []
    assert speed["rehearsal"]["mixed_rows"] == {"rows": 32, "checked": 8, "as_alone": 8, "texts": 32}
    assert speed["rehearsal"]["decode_32"]["mixed_ratio"] > 0
    assert "libcuda" in speed["reason"]
    assert output.rstrip().splitlines()[-1] == (out / "gpu-proof.txt").read_text().splitlines()[-1]


def test_a_plan_is_judged_as_on_a_gpu(rehearsed: tuple[dict[str, Any], str, Path], tmp_path: Path) -> None:
    """What follows once a plan opens, which no rehearsal reaches: here the device front end on a stand-in for CUDA."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    if not HAS_TENSOR_SCATTER:
        pytest.skip("this ONNX Runtime has no TensorScatter; 1.24 has")
    from helpers.lazy_cuda import LazyCuda, LazyPlans, lazy_device

    plan = Plan(rehearsed[2] / "work" / "tiny", is_full=False, has_gpu=True, ends_at=time.monotonic() + 20)
    record, cuda = Record(tmp_path / "record.json"), LazyCuda()
    folder = plan.deployment("float32")
    profile = parse_profile(_SMALL_PROFILE, read_manifest(folder).base)
    device = lazy_device(cuda)
    backend = FrontBackend(device, lambda graphs, shapes: LazyPlans(cuda, graphs, shapes), profile, in_place=True)
    with record.part("planted"):
        run_plan(record, plan, folder, (backend, device), 0.5)
    record.check_parts()
    figures = record.content["figures"]["planted"]
    assert figures["mixed_rows"]["as_alone"] == 8
    assert figures["swap_requests"]["recorded"] == 0
    assert figures["receipt"]["unchanged"]
    names = [target["name"] for target in record.content["targets"]]
    assert names[0] == "planted: deviation from PyTorch, as a share of its limit"
    assert record.content["targets"][0]["met"]
    assert [name for name in names if "recorded anew over 20 swaps" in name]
    assert cuda.launches > 20


def test_without_a_rehearsal_a_step_says_at_once_that_there_is_no_device(tmp_path: Path) -> None:
    report, _ = rehearse(tmp_path, "--steps", "training")
    step = report["steps"]["training"]
    assert step["status"] == "skipped"  # it needs the bases
    assert step["reason"] == "it needs the step bases: not run"


@pytest.mark.slow
def test_the_whole_rehearsal_takes_less_than_two_minutes(tmp_path: Path) -> None:
    begun = time.monotonic()
    report, _ = rehearse(tmp_path, "--rehearse")
    seconds = time.monotonic() - begun
    check_schema(report, tmp_path)
    statuses = {name: step["status"] for name, step in report["steps"].items() if name != "wheels"}
    assert statuses.keys() == {step.name for step in STEPS}
    for name, status in statuses.items():
        assert status in (("passed",) if name in ON_CPU else ("no device", "missing")), report["steps"][name]
    steps = report["steps"]
    assert steps["ort-parity"]["rehearsal"]["failed"] == []
    assert steps["ort-parity"]["rehearsal"]["checks"] > 40
    assert steps["cells"]["rehearsal"]["largest_loss_deviation"] < 1e-4
    in_place = ("cache in place", "cache in place, on the queue's stream") if HAS_TENSOR_SCATTER else ()
    for part in ("growing cache", *in_place):
        figures = steps["device"]["rehearsal"][part]
        assert figures["mixed_rows"]["as_alone"] == 8
        assert all(figures["pytorch"][task]["share_of_limit"] <= 1 for task in ("base", "task-00000", "task-00001"))
    assert seconds < MOST_SECONDS
