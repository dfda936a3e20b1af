"""A KV cache in 8 bits: the codes that the engine stores, and its outputs, against PyTorch with these codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend, SlotEngine
from adalink.runtime.storage.embedding_table import open_table
from adalink.tools.parity.checks.adapter import to_float64
from adalink.tools.parity.checks.outputs import log_softmax
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.stored_cache import read_scales, stored_cache
from adalink.tools.parity.report import Check, at_most

# Rounding to the nearest code is at most half a step away; the rest is the noise of float32, as a share of a step.
MOST_STEPS = 0.5 + 0.01
# With the same codes both sides compute the same: what is left is float32's noise, far below what rounding does.
MOST_OF_EFFECT = 0.01
_ROWS = 4


def check_kv_caches(
    deployment: Deployment,
    reference: Reference,
    folders: Mapping[str, Path],
    rows: list[list[int]],
    backend: Backend,
) -> list[Check]:
    """For each graph of the open variant with another KV cache: the base, and every task without a soft prompt.

    Args:
        deployment: the open deployment.
        reference: PyTorch with the engine's weights.
        folders: adapter folder of each task.
        rows: token ids.
        backend: a backend whose engines do not round activations.
    """
    manifest, checks = deployment.manifest, []
    for dtype, graph in deployment.variant.kv_cache_graphs.items():
        scales = read_scales(deployment.path / graph)
        table = open_table(deployment.path / manifest.base.embeddings, manifest.base)
        engine = backend.open_engine(deployment.path / graph, manifest.base, "base", table)
        assert isinstance(engine, SlotEngine)
        for task in (None, *(name for name in deployment.tasks if not manifest.tasks[name].soft_tokens)):
            name = f"kv-cache/{dtype}/{'base' if task is None else f'task/{task}'}"
            sides: list[tuple[Float64, Float64, Float64]] = []
            distances: list[float] = []
            with reference.adapted(None if task is None else folders[task]):
                for ids in rows[:_ROWS]:
                    embeds = deployment.input_embeddings([ids], tasks=task)
                    logits, states = _run(engine, embeds)
                    codes = dict(zip(scales, states, strict=True))
                    unrounded = reference.values(ids, None)["logits"]
                    with stored_cache(reference.model, codes, scales) as found:
                        sides.append((logits, reference.values(ids, None)["logits"], unrounded))
                    distances += found
            checks.append(at_most(f"{name}/codes", max(distances), MOST_STEPS, "steps from the nearest code"))
            received, expected, exact = (np.concatenate(side) for side in zip(*sides, strict=True))
            checks.append(_compare(f"{name}/logits", received, expected, exact))
        engine.close()
    return checks


def _run(engine: SlotEngine, embeds: Array) -> tuple[Float64, Array]:
    """Logits of one row, ``(tokens, vocab)``, and its codes, ``(2 * layers, kv_heads, tokens, head_dim)``."""
    tokens = embeds.shape[1]
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, tokens), np.int64)}
    state = engine.open_slots(1, tokens)
    state.begin(None)
    state.extend(feeds, 0, tokens)
    states = state.states(0, tokens)
    state.close()
    return to_float64(engine.run(feeds)[0], "float32"), states


def _compare(name: str, received: Float64, expected: Float64, exact: Float64) -> Check:
    """Logits with shape ``(positions, vocab)``: of the engine, of PyTorch with its codes, and without rounding."""
    effect = float(np.sqrt(np.mean((expected - exact) ** 2)))
    away = float(np.sqrt(np.mean((received - expected) ** 2)))
    log_p, log_q = log_softmax(exact), log_softmax(received)
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    return at_most(
        name,
        away / effect if effect else away,
        MOST_OF_EFFECT,
        f"of what rounding keys and values does to the logits, {effect:.3g} rms; the KL divergence is {divergence:.2g}",
    )
