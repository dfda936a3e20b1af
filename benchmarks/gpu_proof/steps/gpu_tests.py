"""The tests that need a GPU (``make test-gpu``): tiny models on every backend, the vision tower's plan among them."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.process import REPOSITORY

_FILES = ("runtime/device/test_gpu.py", "export/engine/test_tensorrt_builder.py", "tools/commands/test_doctor.py")
_NO_TESTS = 5


class _Outcomes:
    """Counts outcomes, and reports each failure when it comes."""

    def __init__(self, record: Record) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()
        self._record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's setup, call or teardown has ended."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.outcome == "skipped":
            self.skipped[str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)] += 1
        if report.outcome == "failed":
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]
        self._record.figures({"outcomes": self.counts, "skipped": self.skipped, "failed": self.failed})


def run(record: Record, plan: Plan) -> None:
    """Run them in this process; a failure is told with the end of its traceback."""
    tests = REPOSITORY / "tests"
    sys.path.append(str(tests))
    outcomes = _Outcomes(record)
    command = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir", str(REPOSITORY)]
    code = pytest.main([*command, *(str(tests / name) for name in _FILES)], plugins=[outcomes])
    record.figure("exit_code", int(code))
    if int(code) not in (0, _NO_TESTS):
        name, told = next(iter(outcomes.failed.items()), ("no test", "pytest itself failed"))
        errors = [line.removeprefix("E").strip() for line in told.splitlines() if line.startswith("E ")]
        raise AssertionError(
            f"{len(outcomes.failed)} tests failed, the first is {name}: {(errors or [told])[-1][:300]}"
        )
