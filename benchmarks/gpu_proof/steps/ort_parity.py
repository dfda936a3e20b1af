"""Step (b): every level of ``adalink verify`` on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from pathlib import Path

from adalink.tools.parity.report import Check
from adalink.tools.parity.suite import VerifyOptions, verify
from benchmarks.gpu_proof.measure.ort import stand_in
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.steps.deployments import PARITY_TASKS, RANK
from benchmarks.prepare import add_tasks, copy_base


def run(record: Record, plan: Plan) -> None:
    """Verify a copy with two tasks; the checks that fail are reported with their figures."""
    deployment = plan.work / "deployment-parity"
    copy_base(plan.deployment("float32"), deployment)
    add_tasks(deployment, [RANK] * PARITY_TASKS)
    report_checks(record, plan, deployment, str(plan.small))


def report_checks(record: Record, plan: Plan, deployment: Path, against: str) -> None:
    """Verify a deployment on ONNX Runtime's CUDA provider, or in a rehearsal on the CPU."""
    options = VerifyOptions(backend=stand_in("onnxruntime-cuda", plan), quick=True)
    report = verify(deployment, against, {}, options, progress=lambda line: record.figure("verify_was_at", line))
    failed = [check for check in report.checks if not check.passed]
    record.figures(
        {
            "checks": len(report.checks),
            "failed": [_described(check) for check in failed],
            "closest": [_described(check) for check in sorted(report.checks, key=_used, reverse=True)[:5]],
            "skipped": report.skipped,
            "receipt": report.receipt,
        }
    )
    record.target("checks of verify that fail", len(failed), 0)


def _described(check: Check) -> dict[str, object]:
    return {"name": check.name, "measured": check.measured, "limit": check.limit, "detail": check.detail}


def _used(check: Check) -> float:
    """The share of its limit that a check uses; a control has none."""
    return check.measured / check.limit if check.limit and not check.name.startswith("control/") else 0.0
