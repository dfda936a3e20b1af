"""The seeded bases, and the small one's deployments: portable graphs in float32 and float16, with seeded tasks."""

from __future__ import annotations

import time
from pathlib import Path

from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.gpu_proof.bases import SHAPES, write_base
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.prepare import add_tasks

NEEDS_GPU = False
TASKS, RANK = 64, 16
PARITY_TASKS = 2


def run(record: Record, plan: Plan) -> None:
    """Write and export; what is there is used again."""
    begun = time.perf_counter()
    write_base(plan.small, SHAPES[plan.small.name])
    record.figure("small_base_seconds", time.perf_counter() - begun)
    for dtype in ("float32", "float16"):
        record.figure(f"export_{dtype}_seconds", deploy(plan.small, plan.deployment(dtype), dtype))
    begun = time.perf_counter()
    write_base(plan.large, SHAPES[plan.large.name])
    record.figure("large_base_seconds", time.perf_counter() - begun)


def deploy(base: Path, deployment: Path, dtype: str, tasks: int = TASKS) -> float:
    """Export a base with seeded tasks, ``task-00000`` and so on; the seconds it took."""
    begun = time.perf_counter()
    if not (deployment / MANIFEST_FILE).exists():
        export_base(base, deployment, dtype=dtype, target="portable")
    if not read_manifest(deployment).tasks:
        add_tasks(deployment, [RANK] * tasks)
    return time.perf_counter() - begun
