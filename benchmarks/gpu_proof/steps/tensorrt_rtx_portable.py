"""Step (d), second half: a portable plan of TensorRT-RTX, for all capabilities that it has. In a process of its own."""

from __future__ import annotations

from benchmarks.gpu_proof.measure.engine_case import describe_library, try_plan
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan


def run(record: Record, plan: Plan) -> None:
    """A portable plan in float32; in a rehearsal one for two capabilities."""
    describe_library(record, "tensorrt-rtx")
    with record.part("float32, portable"):
        try_plan(record, plan, "tensorrt-rtx", "float32", "portable", 0.8)
