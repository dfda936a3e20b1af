"""The steps in order of value, and the driver that runs as many of them as the time allows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from benchmarks.gpu_proof.process import Ended, abort_line, last_line, run_limited
from benchmarks.gpu_proof.record import (
    CRASHED,
    NO_DEVICE,
    PASSED,
    RUNNING,
    SKIPPED,
    TIMED_OUT,
    read_json,
    write_json,
)

_PACKAGE = "benchmarks.gpu_proof"
_STEPS = f"{_PACKAGE}.steps"
_REPOSITORY = Path(__file__).parents[2]
# Kept for the last report, and for the rest of the machine to close.
_RESERVE_SECONDS = 4.0
_MERGE_SECONDS = 5.0
_TOOLKIT = Path("/usr/local/cuda/lib64")


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: its name in reports.
        what: what it tries, in a few words.
        module: the module whose ``run`` it is.
        limit_s: when it is ended.
        least_s: with less time left it is not begun.
        needs: a step without which it cannot run.
    """

    name: str
    what: str
    module: str
    limit_s: float
    least_s: float = 10.0
    needs: str | None = None


STEPS = (
    Step("machine", "GPU, driver, libraries, bandwidth", f"{_STEPS}.machine", 45),
    Step("bases", "seeded bases and deployments", f"{_STEPS}.deployments", 150, 20),
    Step("ort-parity", "ONNX Runtime CUDA: verify", f"{_STEPS}.ort_parity", 150, 20, needs="bases"),
    Step("ort-speed", "ONNX Runtime CUDA: swaps, decode, batch of 32", f"{_STEPS}.ort_speed", 90, needs="bases"),
    Step("device", "device front end and CUDA graphs", f"{_STEPS}.device_engine", 75, needs="bases"),
    Step("tensorrt-rtx", "TensorRT-RTX: plans on this GPU", f"{_STEPS}.tensorrt_rtx", 90, needs="bases"),
    Step("rtx-portable", "TensorRT-RTX: a portable plan", f"{_STEPS}.tensorrt_rtx_portable", 60, needs="bases"),
    Step("rtx-plugin", "TensorRT-RTX in ONNX Runtime", f"{_STEPS}.rtx_plugin", 60, needs="bases"),
    Step("tensorrt", "TensorRT, where its libraries are", f"{_STEPS}.tensorrt_engine", 90, needs="bases"),
    Step("tests", "tests that need a GPU", f"{_STEPS}.gpu_tests", 90, 15),
    Step("training", "AdaLink, prefix and LoRA in bfloat16", f"{_STEPS}.training", 90, 15, needs="bases"),
    Step("cells", "many configurations in one batch", f"{_STEPS}.cells", 75, needs="bases"),
    Step("study", "the full study's learning rates, on real texts", f"{_STEPS}.study_rows", 120, 40, needs="bases"),
    Step("real", "SmolLM2 with the example adapters: verify", f"{_STEPS}.real", 150, 60),
    Step("large", "the base of 1B parameters, float16", f"{_STEPS}.large", 150, 60, needs="bases"),
)


class Driver:
    """Runs steps one after another and keeps one report, which is whole at any moment."""

    def __init__(
        self,
        reports: Sequence[Path],
        work: Path,
        deadline: float,
        environment: Mapping[str, str],
        *,
        is_full: bool = True,
        rehearses: bool = False,
    ) -> None:
        """Prepare.

        Args:
            reports: files that the report of the whole run is written to.
            work: folder of what steps share, of their own reports and logs.
            deadline: when all must be done, by ``time.monotonic``.
            environment: of the steps.
            is_full: the real sizes; else tiny ones.
            rehearses: whether steps run on stand-ins where there is no GPU.
        """
        self.content: dict[str, Any] = {"steps": {}}
        self._reports, self._work, self._deadline = tuple(reports), work, deadline
        self._environment, self._size = environment, "full" if is_full else "tiny"
        self._flags = [*(["--full"] if is_full else []), *(["--rehearse"] if rehearses else [])]

    def describe(self, **values: object) -> None:
        """Add to the report, beside the steps."""
        self.content |= values
        self.save()

    def go_on(self, last: Mapping[str, Any]) -> None:
        """Take over the steps of an earlier report of the same sizes, but for those that were left out."""
        if last.get("is_full") != self.content.get("is_full"):
            return
        steps = {name: step for name, step in last.get("steps", {}).items() if step["status"] != SKIPPED}
        self.content["steps"] |= steps

    def has(self, name: str) -> bool:
        """Whether a step has a result."""
        return name in self.content["steps"]

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps that have no result yet; none of them can stop the others."""
        for step in steps:
            if not self.has(step.name):
                self.note(step.name, self._run(step))

    def note(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep a step's result."""
        self.content["steps"][name] = dict(result)
        self.save()
        print(f"{name}: {result['status']} {result.get('seconds', 0):.1f} s {result['reason']}"[:300], flush=True)

    def save(self) -> None:
        """Write the report."""
        self._write(self.content)

    def _write(self, content: Mapping[str, Any]) -> None:
        for path in self._reports:
            write_json(path, content)

    @property
    def seconds_left(self) -> float:
        """Seconds until all must be done."""
        return self._deadline - time.monotonic() - _RESERVE_SECONDS

    def _run(self, step: Step) -> dict[str, Any]:
        begun_with = {"what": step.what, "limit_seconds": step.limit_s, "seconds": 0.0}
        needed = self.content["steps"].get(step.needs, {}).get("status")
        if step.needs is not None and needed not in (PASSED, NO_DEVICE):
            return {**begun_with, "status": SKIPPED, "reason": f"it needs the step {step.needs}: {needed or 'not run'}"}
        left = self.seconds_left
        if left < step.least_s:
            reason = f"{max(left, 0):.0f} s were left, it needs {step.least_s:.0f} s or more"
            return {**begun_with, "status": SKIPPED, "reason": reason}
        limit = min(step.limit_s, left)
        record = self._work / "records" / f"{step.name}.json"
        record.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"{_PACKAGE}.step", step.module, "--record", str(record)]
        command += ["--work", str(self._work / self._size), "--limit", f"{0.9 * limit:.1f}", *self._flags]
        ended = run_limited(command, limit, self._environment, self._work / "logs" / step.name, self._merger(record))
        return begun_with | {"limit_seconds": limit} | judge(ended, read_json(record))

    def _merger(self, record: Path) -> Any:
        """Keeps what a running step has reported so far, in case that the whole machine goes."""
        last = [time.monotonic()]

        def merge() -> None:
            if time.monotonic() - last[0] > _MERGE_SECONDS:
                last[0] = time.monotonic()
                self._write({**self.content, "running": read_json(record)})

        return merge


def judge(ended: Ended, record: dict[str, Any] | None) -> dict[str, Any]:
    """The result of a step: its own report, or what the driver saw where it could not report."""
    result = record or {"status": RUNNING, "reason": "", "traceback": "", "figures": {}, "targets": [], "notes": []}
    result |= {"seconds": round(ended.seconds, 2), "exit_code": ended.code}
    where = abort_line(ended.stderr)
    if ended.code is None and result["status"] == RUNNING:
        result |= {"status": TIMED_OUT, "reason": f"ended after {ended.seconds:.0f} s; it was at {where or 'no line'}"}
    elif result["status"] == RUNNING:
        result |= {
            "status": CRASHED,
            "reason": f"{_ending(ended.code)}: {where or last_line(ended.stderr or ended.stdout)}",
        }
    elif ended.code != 0:
        result["notes"] = [*result["notes"], f"after its last report it ended with {_ending(ended.code)}: {where}"]
    return result | {"stdout": ended.stdout, "stderr": ended.stderr}


def _ending(code: int | None) -> str:
    if code is None:
        return "a hang"
    return f"signal {Signals(-code).name}" if code < 0 else f"exit code {code}"


def step_environment(site: Path | None, work: Path) -> dict[str, str]:
    """Environment of the steps: the checkout, what was installed for it, CUDA's libraries, and no network.

    The driver takes CUDA's libraries from the folders of torch's own packages: ONNX Runtime finds them there only if
    they are on the path when the process begins.
    """
    paths = [*([str(site)] if site is not None else []), str(_REPOSITORY / "src"), str(_REPOSITORY)]
    libraries = [str(folder) for folder in cuda_folders()]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        "XDG_CACHE_HOME": str(work / "cache"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def cuda_folders() -> list[Path]:
    """Folders of NVIDIA's packages for Python that hold libraries; then the toolkit's, if there is one."""
    found: list[Path] = []
    for entry in map(Path, sys.path):
        root = entry / "nvidia"
        if root.is_dir():
            found += sorted({library.parent for library in root.glob("*/lib/*.so*")})
    return found + [folder for folder in (_TOOLKIT,) if folder.is_dir()]
