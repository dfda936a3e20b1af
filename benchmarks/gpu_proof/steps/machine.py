"""Step (a): what this machine is, which backends answer, and how fast its memory and its products are."""

from __future__ import annotations

import time
from typing import Any

from adalink.runtime.backends import BACKENDS
from adalink.tools.common.environment import describe_environment
from adalink.tools.doctor.probe import probe, probe_gpus
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.schedule import cuda_folders
from benchmarks.gpu_proof.step import Plan

NEEDS_GPU = False
_COPY_BYTES = 4 << 30
_SIZE, _ROUNDS = 8192, 10


def run(record: Record, plan: Plan) -> None:
    """Ask everything, the most important first."""
    record.figures({"environment": describe_environment(), "gpus": probe_gpus()})
    record.figure("cuda_folders", cuda_folders())
    record.figure("torch", _torch())
    for name in BACKENDS:
        record.figure(f"probe {name}", probe(name)._asdict())
    if plan.has_gpu:
        record.figures(_ceilings())


def _torch() -> dict[str, object]:
    import torch

    backends: Any = torch.backends
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": backends.cudnn.version(),
        "sees_gpu": torch.cuda.is_available(),
    }


def _ceilings() -> dict[str, float]:
    """Bytes read and written a second, and bfloat16 operations a second: medians on random data."""
    return {"copy_gigabytes_per_second": _copy_rate(), "bfloat16_teraflops": _product_rate()}


def _copy_rate() -> float:
    import torch

    source = torch.randn(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_seconds(torch, lambda: target.copy_(source)) / 1e9


def _product_rate() -> float:
    import torch

    left, right = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * _SIZE**3 / _median_seconds(torch, lambda: left @ right) / 1e12


def _median_seconds(torch: Any, work: Any) -> float:
    times = []
    for number in range(_ROUNDS + 3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]
