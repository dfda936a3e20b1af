"""Step (f): the package ``tensorrt``, where its libraries are; then as a provider of ONNX Runtime."""

from __future__ import annotations

from benchmarks.gpu_proof.measure.engine_case import describe_library, try_plan
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.steps.rtx_plugin import try_provider


def run(record: Record, plan: Plan) -> None:
    """Plans in float32 and float16, then the provider, which builds its own."""
    describe_library(record, "tensorrt")
    for dtype, share in (("float32", 0.3), ("float16", 0.5)):
        with record.part(dtype):
            try_plan(record, plan, "tensorrt", dtype, "current", share)
    with record.part("onnxruntime-tensorrt"):
        try_provider(record, plan, "onnxruntime-tensorrt")
