"""What folding costs and gains: bytes as on the disk, and the times of the two ways, each under its own name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.runtime import build

from adalink.export.adapter.export import export_adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.adapter_mapping import AdapterMapping
from adalink.tools.bench import fold_tradeoff as fold_trade


def test_figures_of_known_times(tmp_path, monkeypatch):
    tiny, clock, tokens = build("llama", tmp_path), SimpleNamespace(now=0.0), []
    export_adapter(tiny.sources / "beta", tiny.folder, name="folded", fold="table")

    def lookup(self, table, ids):
        assert ids.shape == (1, 1)
        tokens.append(ids.item())
        clock.now += 2e-6

    def apply(self, embeds):
        assert embeds.shape == (1, 1, 48)
        clock.now += 3e-5

    monkeypatch.setattr(AdapterMapping, "lookup", lookup)
    monkeypatch.setattr(AdapterMapping, "apply", apply)
    monkeypatch.setattr(fold_trade, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    manifest = read_manifest(tiny.folder)
    found = fold_trade.fold_trade(tiny.folder, manifest, "folded")
    entry = manifest.tasks["folded"]
    assert found == pytest.approx({
        "fold_bytes": (tiny.folder / entry.fold.path).stat().st_size,
        "weights_bytes": (tiny.folder / entry.weights).stat().st_size,
        "fold_us": 2.0,
        "graph_us": 30.0,
    })  # fmt: skip
    assert len(set(tokens)) > 90, "tokens of the whole vocabulary, so that their rows are cold"
