"""Step (b): ONNX Runtime's CUDA provider: swaps, decode with and without a task, a batch of 32 tasks."""

from __future__ import annotations

from benchmarks.gpu_proof.measure.case import Case
from benchmarks.gpu_proof.measure.ort import stand_in, wide_backend
from benchmarks.gpu_proof.measure.swap import host_swap
from benchmarks.gpu_proof.measure.timing import microseconds
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan


def run(record: Record, plan: Plan) -> None:
    """Swaps first, then steps of 1, 32 and 8 rows."""
    name = stand_in("onnxruntime-cuda", plan)
    case = Case(record, plan, plan.deployment("float32"), wide_backend(name, plan))
    with case.deployment as deployment:
        case.mixed_answers(32)
        case.swaps(0.3, host_swap(deployment, name))
        tasks = deployment.tasks
        token = [[5]]
        record.figure(
            "adapted_token",
            microseconds(
                lambda index: deployment.input_embeddings(token, tasks=tasks[index % len(tasks)]),
                10_000 if plan.is_full else 100,
                0.1 * plan.seconds_left,
            ),
        )
        for rows, share in ((1, 0.3), (32, 0.5), (8, 0.5)):
            case.decode(rows, share)
        case.first_token(0.5)
        case.receipt()
