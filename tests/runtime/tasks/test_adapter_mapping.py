"""Which rows go through which weights: mixed ranks and kinds against float64, and rows that must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.runtime import ACTIVATIONS, random_adapter

from adalink.export.adapter.check import adapt_with_bound
from adalink.runtime.ort.backend import OnnxRuntimeBackend
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER, AdapterMapping, task_groups

D = 48
MODALITIES = ("text", "image")


@pytest.fixture(scope="module")
def graphs(llama: Any) -> dict[str, Any]:
    base, backend = read_manifest(llama.folder).base, OnnxRuntimeBackend("onnxruntime-cpu", 1)
    kinds = [f"{name}{bias}" for name in ACTIVATIONS for bias in ("", "_bias")]
    return {kind: backend.open_bank(kind, (llama.folder / base.bank[kind]).read_bytes(), base) for kind in kinds}


def make(seed: int, rank: int, activation: str = "gelu", **settings: Any) -> Adapter:
    wanted = {"bias": False, "scope": "all", "modalities": ("text",)} | settings
    return random_adapter("sha256:" + "5a" * 32, D, seed, rank=rank, activation=activation, **wanted)


def choose(graphs: dict[str, Any], rows: list[Adapter | None]) -> AdapterMapping:
    """The selection of a mixed batch, without a deployment."""
    members: dict[int, list[int]] = {}
    for row, adapter in enumerate(rows):
        if adapter is not None:
            members.setdefault(id(adapter), []).append(row)
    parts = []
    for own in members.values():
        adapter = rows[own[0]]
        assert adapter is not None
        for part in task_groups(adapter, MODALITIES, graphs[adapter.config.activation_key]):
            parts.append(replace(part, rows=np.array(own)))
    return AdapterMapping(parts)


def batch(rows: int, length: int = 1, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, length, D)).astype(np.float32)
    x[..., :2] = 0.0, -0.0
    return x


def assert_adapted(received: np.ndarray, adapter: Adapter | None, x: np.ndarray, modality: str = "text") -> None:
    if adapter is None:
        assert received.tobytes() == x.tobytes()  # -0.0 too
        return
    expected, bound = adapt_with_bound(adapter, modality, x.astype(np.float64), "float32")
    assert (np.abs(received - expected) <= bound).all()
    assert (np.abs(x - expected) > bound).any()


def test_ranks_and_kinds_mixed_in_one_batch(graphs: dict[str, Any]) -> None:
    adapters = [
        make(1, 1),
        make(2, 7),
        make(3, 48, bias=True),
        make(4, 3, bias=True),
        make(5, 2, "silu"),
        make(6, 5, "identity", bias=True),
    ]
    rows = [adapters[0], None, adapters[2], adapters[1], adapters[0], adapters[3], None, adapters[4], adapters[5]]
    chosen, x = choose(graphs, rows), batch(len(rows))
    steps = chosen.for_decoding()
    assert len(steps._groups) == 4  # one call for each kind
    for selection in (chosen, steps):
        adapted = selection.apply(x)
        for row, adapter in enumerate(rows):
            assert_adapted(adapted[row], adapter, x[row])
    # One shape of product for all: a row in company is the row alone, to the last bit.
    alone = choose(graphs, [adapters[2]]).apply(x[2:3])
    np.testing.assert_array_equal(chosen.apply(x)[2:3], alone)


def test_padding_changes_no_bit_whatever_its_width(graphs: dict[str, Any]) -> None:
    small, large = make(1, 4, "tanh", bias=True), make(2, 48, "tanh", bias=True)
    x = batch(2)
    x[1] = 0.0
    stacked = choose(graphs, [small, large]).for_decoding()
    (part,) = stacked._groups
    assert part.weights["down"].shape == (2, 48, D)
    assert not part.weights["down"][0, 4:].any()
    assert not part.weights["up"][0, :, 4:].any()
    assert_adapted(stacked.apply(x)[0], small, x[0])


def test_rows_that_go_and_change_places_keep_their_stacked_weights(graphs: dict[str, Any]) -> None:
    adapters = [make(1, 3), make(2, 7), make(3, 5), make(4, 2, "silu")]
    rows = [None, adapters[0], adapters[3], adapters[1], adapters[0], adapters[2], None, adapters[1]]
    steps, rng = choose(graphs, rows).for_decoding(), np.random.default_rng(5)
    while len(rows) > 1:
        kept = rng.permutation(len(rows))[:-1]
        rows, steps = [rows[place] for place in kept], steps.take(kept.tolist())
        x = batch(len(rows), seed=len(rows))
        for own, adapter, plain in zip(steps.apply(x), rows, x, strict=True):
            assert_adapted(own, adapter, plain)


def test_scope_prompt_leaves_generated_tokens_alone(graphs: dict[str, Any]) -> None:
    every, prompt = make(1, 3), make(2, 3, scope="prompt")
    rows, x = [prompt, every, None], batch(3)
    selection = choose(graphs, rows)
    for row, adapter in enumerate(rows):
        assert_adapted(selection.apply(x)[row], adapter, x[row])
        assert_adapted(selection.for_decoding().apply(x)[row], None if adapter is prompt else adapter, x[row])
    only = choose(graphs, [prompt]).for_decoding()
    assert only.apply(x) is x
    assert NO_ADAPTER.for_decoding() is NO_ADAPTER


def test_modalities_by_position(graphs: dict[str, Any]) -> None:
    both = make(1, 3, "silu", bias=True, modalities=("image", "text"))
    image, text = make(2, 4, modalities=("image",)), make(3, 2)
    rows, x = [both, image, None, text, both], batch(5, 30)
    modality = np.random.default_rng(4).integers(-1, 2, (5, 30))
    adapted = choose(graphs, rows).apply(x, modality)
    for row, adapter in enumerate(rows):
        for index, name in ((0, "text"), (1, "image"), (-1, "none")):
            here = modality[row] == index
            assert here.any()
            own = adapter if adapter is not None and name in adapter.config.modalities else None
            assert_adapted(adapted[row, here], own, x[row, here], name)
    without = choose(graphs, rows).apply(x)  # all text
    for row, adapter in enumerate(rows):
        assert_adapted(without[row], None if adapter is image else adapter, x[row])


def test_weights_are_views_and_not_copies(graphs: dict[str, Any]) -> None:
    adapter = make(1, 4, bias=True)
    (part,) = task_groups(adapter, MODALITIES, graphs["gelu_bias"])
    for name, weight in part.weights.items():
        stem, _, kind = name.partition("_")
        assert np.shares_memory(weight, adapter.weights[f"text.{stem}.{kind or 'weight'}"])
