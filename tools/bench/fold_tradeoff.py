"""What folding a task costs and gains on this machine: bytes, and time to adapt one token."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adalink.runtime.backends import open_backend
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.tasks.registry import TaskRegistry

_ROUNDS = 2000


def fold_trade(folder: Path, manifest: Manifest, task: str) -> dict[str, float]:
    """Measure a folded task against its weights in the bank, in turns, without opening the engine.

    Returns:
        ``fold_bytes``, ``weights_bytes``, and ``fold_us`` and ``graph_us``: medians for one token, lookup included.
    """
    entry, base = manifest.tasks[task], manifest.base
    assert entry.fold is not None
    selection = TaskRegistry(folder, manifest, open_backend("onnxruntime-cpu", 1)).resolve(task, 1)
    table = open_table(folder / base.embeddings, base)
    tokens = np.random.default_rng(0).integers(0, base.vocab_size, (_ROUNDS, 1, 1))

    def folded(ids: np.ndarray) -> object:
        return selection.lookup(table, ids)

    def in_bank(ids: np.ndarray) -> object:
        return selection.apply(table.take(ids))

    times: dict[str, list[float]] = {"fold_us": [], "graph_us": []}
    ways: dict[str, Callable[[np.ndarray], object]] = {"fold_us": folded, "graph_us": in_bank}
    for ids in tokens:
        for name, way in ways.items():
            start = time.perf_counter()
            way(ids)
            times[name].append(time.perf_counter() - start)
    return {
        "fold_bytes": manifest.size_bytes((entry.fold.path,)),
        "weights_bytes": manifest.size_bytes((entry.weights,)),
        **{name: 1e6 * float(np.median(samples)) for name, samples in times.items()},
    }
