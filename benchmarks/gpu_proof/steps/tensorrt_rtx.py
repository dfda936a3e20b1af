"""Step (d): does TensorRT-RTX build for this GPU, deserialise and run on it?

Where its targets do not have the GPU's capability, a plan for "current" shows what the library says of it.
"""

from __future__ import annotations

from benchmarks.gpu_proof.measure.engine_case import describe_library, try_plan
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan

_BACKEND = "tensorrt-rtx"


def run(record: Record, plan: Plan) -> None:
    """A plan in float32, then one in float16, for the GPU that is here."""
    describe_library(record, _BACKEND)
    target = "current" if plan.has_gpu else "sm86"
    with record.part(f"float32, {target}"):
        try_plan(record, plan, _BACKEND, "float32", target, 0.4)
    with record.part(f"float16, {target}"):
        try_plan(record, plan, _BACKEND, "float16", target, 0.8)
