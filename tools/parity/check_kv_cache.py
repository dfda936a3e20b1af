"""A KV cache in 8 bits, against PyTorch with the same rounding of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.options import OpenOptions
from adalink.tools.parity.check_adapter import to_float64
from adalink.tools.parity.check_outputs import log_softmax
from adalink.tools.parity.reference import Reference
from adalink.tools.parity.report import Check, at_most
from adalink.tools.parity.rounded_cache import read_scales, rounded_cache

# Rows whose rounding is independent of the reference's are sqrt(2) of its effect away; those that round alike are away
# by the few numbers on the edge between two codes.
LIMIT = 0.5
_ROWS = 4


def check_kv_caches(
    deployment: Deployment,
    reference: Reference,
    folders: Mapping[str, Path],
    rows: list[list[int]],
    engine: tuple[Backend, str],
) -> list[Check]:
    """For each graph of the open variant with another KV cache, the base and every task.

    Args:
        deployment: the open deployment.
        reference: PyTorch with the engine's weights.
        folders: adapter folder of each task.
        rows: token ids.
        engine: backend, which computes without rounded activations, and variant.
    """
    backend, variant = engine
    checks = []
    for dtype, graph in deployment.variant.kv_cache_graphs.items():
        scales = read_scales(deployment.path / graph)
        options = OpenOptions(variant, kv_cache_dtype=dtype)
        with Deployment(deployment.path, deployment.manifest, backend, options) as rounded:
            for task in (None, *deployment.tasks):
                name = f"kv-cache/{dtype}/{'base' if task is None else f'task/{task}'}"
                with reference.adapted(None if task is None else folders[task]):
                    exact = [reference.values(ids, None)["logits"] for ids in rows[:_ROWS]]
                    with rounded_cache(reference.model, scales):
                        expected = [reference.values(ids, None)["logits"] for ids in rows[:_ROWS]]
                received = [
                    to_float64(rounded.run(input_ids=[ids], tasks=task)["logits"][0], "float32") for ids in rows[:_ROWS]
                ]
                checks.append(_compare(name, *map(np.concatenate, (received, expected, exact))))
    return checks


def _compare(name: str, received: Float64, expected: Float64, exact: Float64) -> Check:
    """Logits with shape ``(positions, vocab)``: of the engine, of PyTorch with rounding, and without."""
    effect = float(np.sqrt(np.mean((expected - exact) ** 2)))
    away = float(np.sqrt(np.mean((received - expected) ** 2)))
    log_p, log_q = log_softmax(exact), log_softmax(received)
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    return at_most(
        name,
        away / effect if effect else away,
        LIMIT,
        f"of what rounding keys and values does to the logits; {effect:.3g} rms. The KL divergence is {divergence:.2g}",
    )
