"""`adalink verify` on a base that takes embeddings of two modalities, with adapters of one and of both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_deployments import make_model_folder

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks import registry
from adalink.runtime.tasks.adapter_mapping import AdapterMapping
from adalink.tools.parity import levels, suite

BOTH = {"rank": 4, "activation": "tanh", "bias": True, "scope": "all", "modalities": ("image", "text")}
TASKS: dict[str, dict[str, Any]] = {
    "both": BOTH,
    "soft": BOTH | {"soft_tokens": 2, "modalities": ("text", "image"), "scope": "prompt"},
    "looks": BOTH | {"modalities": ("image",)},
    "words": BOTH | {"modalities": ("text",)},
    "ids": {"rank": 2, "activation": "identity", "bias": False, "scope": "all", "input": "ids"},
}


@pytest.fixture(scope="module", params=["llama", "bert"])
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    model, folder = make_model_folder(root / "tiny", request.param), root / "out"
    base = export_base(model, folder, modalities=("text", "image")).base
    for seed, (name, settings) in enumerate(TASKS.items()):
        adapter = random_adapter(base.fingerprint, base.hidden_size, 50 + seed, **settings)
        export_adapter(write_adapter(root / "adapters" / name, adapter), folder)
    return model, folder


def outcome(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, *, generate: bool = False) -> dict[str, bool]:
    monkeypatch.setattr(suite, "check_swaps", lambda *_: ([], {}))  # fresh processes, of which this is not about
    if not generate:
        monkeypatch.setattr(levels, "_Generated", lambda *_: None)
    report = suite.verify(pair[1], str(pair[0]), {}, suite.VerifyOptions(threads=1, quick=True))
    return {check.name: check.passed for check in report.checks}


def test_a_clean_deployment_passes(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = outcome(clean, monkeypatch, generate=True)
    assert all(checks.values()), {name for name, passed in checks.items() if not passed}
    (output,) = {name.rpartition("/")[2] for name in checks if name.startswith("base/modalities/")} & {
        "logits",
        "last_hidden_state",
    }
    for task in TASKS:
        assert {f"task/{task}/modalities/{output}", f"control/{task}/modalities/{output}"} <= checks.keys()
    # On text alone an adapter of images changes nothing.
    assert f"control/looks/{output}" not in checks
    assert f"control/words/{output}" in checks


@pytest.mark.parametrize("fault", ["swapped", "ignored", "everywhere"])
def test_faults_of_modalities_are_found(
    clean: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The adapter of another modality; the map left out; the adapter also where a position has no modality."""
    pair = clean[0], shutil.copytree(clean[1], tmp_path / "out")
    assert read_manifest(pair[1]).base.modalities == ("text", "image")
    if fault == "swapped":
        true = registry.task_groups
        monkeypatch.setattr(registry, "task_groups", lambda adapter, known, graph: true(adapter, known[::-1], graph))
    else:
        apply = AdapterMapping.apply

        def changed(self: AdapterMapping, embeds: Any, modality: Any = None) -> Any:
            if modality is not None:
                modality = None if fault == "ignored" else np.where(modality < 0, 0, modality)
            return apply(self, embeds, modality)

        monkeypatch.setattr(AdapterMapping, "apply", changed)
    checks = outcome(pair, monkeypatch)
    failed = {name for name, passed in checks.items() if not passed}
    assert any(name.startswith("task/both/modalities/") for name in failed)
    assert any(name.startswith("task/soft/modalities/") for name in failed)
    assert not any(name.startswith("base/") for name in failed)
