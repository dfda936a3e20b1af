"""The base of 1B parameters in float16 on ONNX Runtime's CUDA provider: what a task costs where steps cost more."""

from __future__ import annotations

from benchmarks.gpu_proof.measure.case import Case
from benchmarks.gpu_proof.measure.ort import wide_backend
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.steps.deployments import deploy


def run(record: Record, plan: Plan) -> None:
    """Export, then steps of 1 and 32 rows."""
    folder = plan.work / "deployment-large"
    record.figure("export_seconds", deploy(plan.large, folder, "float16"))
    case = Case(record, plan, folder, wide_backend("onnxruntime-cuda", plan))
    with case.deployment:
        case.mixed_answers(8)
        case.decode(1, 0.4)
        case.decode(32, 0.6)
        case.first_token(0.6)
