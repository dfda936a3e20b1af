"""The driver: a step that hangs, crashes or raises costs itself, and the report names where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

from benchmarks.gpu_proof.record import Record, read_json
from benchmarks.gpu_proof.schedule import STEPS, Driver, Step, cuda_folders, step_environment
from benchmarks.gpu_proof.table import lines_of

# Modules of planted steps: what `run` does.
PLANTED = {
    "good": "record.figure('answer', 42)\n    record.target('small', 1.5, 1.0)",
    "hang": "record.figure('begun', 1)\n    import time\n    time.sleep(600)",
    "crash": "record.figure('begun', 1)\n    import os\n    os.abort()",
    "leave": "import os\n    print('as far as here', flush=True)\n    os._exit(3)",
    "wrong": "record.figure('begun', 1)\n    raise ValueError('the planted fault')",
    "parts": (
        "with record.part('first'):\n        raise KeyError('lost')\n"
        "    with record.part('second'):\n        record.figure('answer', 7)"
    ),
    "late": "record.finish('passed')\n    import os\n    os.abort()",
}


def is_running(pid: int) -> bool:
    """Whether a process still runs after a few seconds."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):
        if not status.exists() or "zombie" in status.read_text(encoding="utf-8"):
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    for name, body in PLANTED.items():
        text = f"NEEDS_GPU = False\n\n\ndef run(record, plan):\n    {body}\n"
        (tmp_path / f"planted_{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    work = tmp_path / "work"
    return Driver([tmp_path / "report.json"], work, time.monotonic() + 60, step_environment(None, work), is_full=False)


def step(name: str, limit: float = 30.0, needs: str | None = None) -> Step:
    return Step(name, f"planted: {name}", f"planted_{name}", limit, 1.0, needs)


def test_each_fault_costs_one_step_and_is_named(driver: Driver, tmp_path: Path) -> None:
    names = ["hang", "crash", "leave", "wrong", "parts", "late", "good"]
    driver.run([step(name, 1.5 if name == "hang" else 30.0) for name in names])
    found = driver.content["steps"]
    assert {name: found[name]["status"] for name in names} == {
        "hang": "timed out",
        "crash": "crashed",
        "leave": "crashed",
        "wrong": "failed",
        "parts": "failed",
        "late": "passed",
        "good": "passed",
    }
    assert 'planted_hang.py", line 7 in run' in found["hang"]["reason"]
    assert 'SIGABRT: File "' in found["crash"]["reason"]
    assert 'planted_crash.py", line 7 in run' in found["crash"]["reason"]
    assert found["leave"]["reason"] == "exit code 3: as far as here"
    assert found["wrong"]["reason"].startswith("ValueError: the planted fault (")
    assert "planted_wrong.py:6, run)" in found["wrong"]["reason"]
    assert "planted_wrong.py" in found["wrong"]["traceback"]
    assert found["parts"]["reason"].startswith("KeyError: 'lost'")
    assert found["parts"]["figures"]["second"] == {"answer": 7}
    # What a step had reported before its end is kept.
    assert all(found[name]["figures"] == {"begun": 1} for name in ("hang", "crash", "wrong"))
    assert found["good"]["figures"] == {"answer": 42}
    # A library that crashes when the process ends does not take back what was measured.
    assert "signal SIGABRT" in found["late"]["notes"][0]
    assert read_json(tmp_path / "report.json") == json.loads(json.dumps(driver.content))


def test_steps_that_no_longer_fit_are_left_out_and_named(driver: Driver) -> None:
    driver._deadline = time.monotonic() + 8
    driver.run([step("hang", 1.0), Step("good", "planted", "planted_good", 30, least_s=20)])
    found = driver.content["steps"]
    assert found["hang"]["status"] == "timed out"
    assert found["good"]["status"] == "skipped"
    assert "it needs 20 s or more" in found["good"]["reason"]


def test_a_second_call_runs_what_the_first_left_out(driver: Driver) -> None:
    first = {"good": {"status": "skipped", "reason": ""}, "wrong": {"status": "failed", "reason": "before"}}
    driver.describe(is_full=False)
    driver.go_on({"steps": {"good": {"status": "passed", "reason": ""}}, "is_full": True})
    assert not driver.has("good"), "sizes of another run were taken over"
    driver.go_on({"steps": first, "is_full": False})
    driver.run([step("wrong"), step("good")])
    steps = driver.content["steps"]
    assert {name: steps[name]["status"] for name in steps} == {"wrong": "failed", "good": "passed"}
    assert steps["wrong"]["reason"] == "before"


def test_a_driver_that_is_told_to_stop_ends_its_step(tmp_path: Path) -> None:
    """Without this the step would go on beside whatever comes next; what was reported is in the file."""
    code = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu_proof.schedule import Driver, Step, step_environment\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"work = Path({str(tmp_path)!r})\n"
        "driver = Driver([work / 'report.json'], work, time.monotonic() + 60, step_environment(None, work))\n"
        "driver.run([Step('hang', 'planted', 'planted_hang', 60)])\n"
    )
    text = "import os, time\nNEEDS_GPU = False\n\n\ndef run(record, plan):\n"
    text += "    record.figure('pid', os.getpid())\n    time.sleep(600)\n"
    (tmp_path / "planted_hang.py").write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY), str(REPOSITORY / "src")])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    record, pid = tmp_path / "records" / "hang.json", None
    for _ in range(200):
        pid = ((read_json(record) or {}).get("figures") or {}).get("pid")
        if pid is not None:
            break
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert pid is not None
    assert not is_running(pid)


def test_a_step_is_left_out_where_what_it_needs_failed(driver: Driver) -> None:
    driver.run([step("wrong"), step("good", needs="wrong")])
    assert driver.content["steps"]["good"]["reason"] == "it needs the step wrong: failed"


def test_children_of_a_step_end_with_it(driver: Driver, tmp_path: Path) -> None:
    """A process that a step leaves running would take the GPU from the next."""
    sleep = f"[{sys.executable!r}, '-c', 'import time; time.sleep(600)']"
    body = f"import subprocess\n    record.figure('pid', subprocess.Popen({sleep}).pid)"
    text = f"NEEDS_GPU = False\n\n\ndef run(record, plan):\n    {body}\n"
    (tmp_path / "planted_child.py").write_text(text, encoding="utf-8")
    driver.run([step("child")])
    assert not is_running(driver.content["steps"]["child"]["figures"]["pid"])


def test_the_table_has_failures_first_and_targets_last(driver: Driver) -> None:
    driver.run([step("good"), step("wrong")])
    lines = lines_of(driver.content)
    assert [line.split()[0] for line in lines[1:3]] == ["wrong", "good"]
    assert "ValueError: the planted fault" in lines[1]
    assert lines[3] == "target NOT MET: good, small: 1.5 (at most 1.0)"


def test_figures_that_are_no_numbers_become_null(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.json")
    record.figure("ratio", float("nan"))
    record.target("never met", float("inf"), 1.0)
    found = read_json(tmp_path / "r.json")
    assert found is not None
    assert found["figures"] == {"ratio": None}
    assert found["targets"] == [{"name": "never met", "measured": None, "limit": 1.0, "met": False}]


def test_cuda_is_looked_for_in_pythons_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layouts of NVIDIA's packages: one folder for CUDA 13, one a library before."""
    for folder in ("cu13", "cudnn", "empty"):
        (tmp_path / "nvidia" / folder / "lib").mkdir(parents=True)
    for file in ("cu13/lib/libcublas.so.13", "cudnn/lib/libcudnn.so.9"):
        (tmp_path / "nvidia" / file).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "none")])
    found = [folder for folder in cuda_folders() if folder.is_relative_to(tmp_path)]
    assert found == [tmp_path / "nvidia" / "cu13" / "lib", tmp_path / "nvidia" / "cudnn" / "lib"]
    path = step_environment(None, tmp_path)["LD_LIBRARY_PATH"]
    assert path.startswith(f"{found[0]}{os.pathsep}{found[1]}")


def test_steps_come_in_the_order_of_their_value() -> None:
    names = [step.name for step in STEPS]
    assert len(names) == len(set(names))
    wanted = [
        "machine",
        "bases",
        "ort-parity",
        "ort-speed",
        "device",
        "tensorrt-rtx",
        "rtx-plugin",
        "tensorrt",
        "training",
        "cells",
    ]
    assert [name for name in names if name in wanted] == wanted
    assert all(step.needs is None or names.index(step.needs) < names.index(step.name) for step in STEPS)


def test_the_driver_needs_the_standard_library_alone() -> None:
    """It runs before anything is installed; ``-S`` leaves installed packages out."""
    code = "import benchmarks.gpu_proof.__main__"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
