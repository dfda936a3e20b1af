"""Read bandwidth of the memory: the limit of a decode step, which reads every weight once.

Each thread reduces an array of its own that no cache holds (256 MiB), all at once; NumPy lets go of Python's lock
while it works. Several reductions are tried, because which one keeps up with the memory differs between CPUs; each
counts with the median of its rounds, and the fastest is the limit.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_BYTES = 256 * 2**20
_ROUNDS = 15

_REDUCTIONS: tuple[tuple[str, Callable[[Any], object]], ...] = (
    ("int64", np.sum),
    ("float32", np.max),
    ("float32", lambda array: np.dot(array, array)),
)


def measure_bandwidth(threads: int, array_bytes: int = _BYTES, rounds: int = _ROUNDS) -> float:
    """Read bandwidth in GB/s, by the fastest of the reductions."""
    arrays = [np.ones(array_bytes // 8, np.int64) for _ in range(threads)]
    return max(
        statistics.median(_round([array.view(dtype) for array in arrays], reduce) for _ in range(rounds))
        for dtype, reduce in _REDUCTIONS
    )


def _round(arrays: list[Any], reduce: Callable[[Any], object]) -> float:
    """GB/s of all threads together, from the first one's start to the last one's end."""
    barrier = threading.Barrier(len(arrays))
    begins, ends = [], []

    def work(array: Any) -> None:
        barrier.wait()
        begins.append(time.perf_counter())
        reduce(array)
        ends.append(time.perf_counter())

    workers = [threading.Thread(target=work, args=(array,)) for array in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return float(sum(array.nbytes for array in arrays) / (max(ends) - min(begins)) / 1e9)
