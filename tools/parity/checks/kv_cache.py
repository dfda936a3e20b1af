"""A KV cache in 8 bits: the codes that the engine stores, and its outputs, against PyTorch with these codes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend, Engine, SlotEngine
from adalink.runtime.storage.embedding_table import open_table
from adalink.tools.parity.checks.outputs import log_softmax
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import widened
from adalink.tools.parity.reference.stored_cache import CodeFigures, read_scales, stored_cache
from adalink.tools.parity.report import Check, at_most, more_than

# Rounding to the nearest code is at most half a step away; the rest is the noise of float32, as a share of a step.
MOST_STEPS = 0.5 + 0.01
# With the same codes both sides compute the same: what is left is float32's noise, far below what rounding does.
MOST_OF_EFFECT = 0.01
# Share of numbers beyond the last code. One in 100,000 is usual, and one in 200 costs half of what four bits cost
# (docs/decisions/0026).
MOST_CLIPPED = 0.001
# The largest code of a typical channel, of 127, on a few short prompts. Scales have twice the range of 2,048 tokens.
LEAST_CODE = 8
_ROWS = 4


def check_kv_caches(
    deployment: Deployment,
    reference: Reference,
    folders: Mapping[str, Path],
    rows: list[list[int]],
    backend: Backend,
) -> list[Check]:
    """For each graph of the open variant with another KV cache: the base, and tasks with nothing before the text.

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
        with closing(backend.open_engine(deployment.path / graph, manifest.base, "base", table)) as engine:
            for task in (None, *(name for name in deployment.tasks if not manifest.tasks[name].prepended_positions)):
                name = f"kv-cache/{dtype}/{'base' if task is None else f'task/{task}'}"
                with reference.adapted(None if task is None else folders[task]):
                    embeds = [deployment.input_embeddings([ids], tasks=task) for ids in rows[:_ROWS]]
                    checks += _check_task(name, engine, reference, scales, list(zip(rows, embeds, strict=False)))
    return checks


def _check_task(
    name: str,
    engine: Engine,
    reference: Reference,
    scales: Mapping[str, Array],
    rows: list[tuple[list[int], Array]],
) -> list[Check]:
    """Rows are token ids and adapted embeddings; the task's adapter is attached to the reference."""
    differences = _Differences()
    largest: list[Array] = []
    figures = CodeFigures()
    for ids, embeds in rows:
        logits, states = _run(engine, embeds)
        unrounded = reference.values(ids, None)["logits"]
        with stored_cache(reference.model, dict(zip(scales, states, strict=True)), scales) as row:
            differences.add(logits, reference.values(ids, None)["logits"], unrounded)
        figures.add(row)
        largest.append(np.abs(states.astype(np.int16)).max(axis=2))
    clipped, codes = figures.clipped / max(1, figures.count), np.max(largest, axis=0)
    least = float(np.median(codes.reshape(len(scales), -1), axis=1).min())
    return [
        at_most(f"{name}/codes", figures.largest, MOST_STEPS, "steps from the nearest code"),
        at_most(f"{name}/clipped", clipped, MOST_CLIPPED, f"share of {figures.count} numbers beyond the last code"),
        more_than(f"{name}/range", least, LEAST_CODE, "largest code of 127 in the median channel of a tensor; least"),
        differences.check(f"{name}/logits"),
    ]


def _run(engine: Engine, embeds: Array) -> tuple[Array, Array]:
    """Logits of one row, ``(tokens, vocab)``, and its codes, ``(2 * layers, kv_heads, tokens, head_dim)``."""
    slots = engine
    assert isinstance(slots, SlotEngine)
    tokens = embeds.shape[1]
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, tokens), np.int64)}
    state = slots.open_slots(1, tokens)
    state.begin(None)
    state.extend(feeds, 0, tokens)
    states = state.states(0, tokens)
    state.close()
    return engine.run(feeds)[0], states


class _Differences:
    """Sums over the logits of all rows."""

    def __init__(self) -> None:
        self._numbers = 0
        self._effect = self._away = 0.0
        self._divergences: list[float] = []

    def add(self, received: Array, expected: Array, exact: Array) -> None:
        """Logits of a row, ``(positions, vocab)``: of the engine, of PyTorch with its codes, and without rounding."""
        for ours, theirs, unrounded in widened(received, expected, exact):
            self._numbers += ours.size
            self._effect += float(np.square(theirs - unrounded).sum())
            self._away += float(np.square(ours - theirs).sum())
            log_p, log_q = log_softmax(unrounded), log_softmax(ours)
            self._divergences += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()

    def check(self, name: str) -> Check:
        """How far the engine is from PyTorch with its codes, beside what rounding does."""
        effect, away = (float(np.sqrt(total / self._numbers)) for total in (self._effect, self._away))
        return at_most(
            name,
            away / effect if effect else away,
            MOST_OF_EFFECT,
            f"of what rounding keys and values does to the logits, {effect:.3g} rms; the KL divergence is "
            f"{np.mean(self._divergences):.2g}",
        )
