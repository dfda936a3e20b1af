"""`adalink verify` on an encoder that says how it pools: it passes, and planted faults are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.sentences import save_encoder, save_sentence_encoder

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import text_encoder
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.tools.parity import suite

TASK = {"rank": 3, "activation": "gelu", "bias": True, "scope": "all", "soft_tokens": 2}
BOTH = {"base/pooling", "task/soft/pooling"}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("clean")
    pooling = {"pooling_mode": ("mean", "weightedmean", "cls"), "include_prompt": False}
    settings = {"prompts": {"query": "query of me: "}, "default_prompt_name": "query", "max_seq_length": 30}
    model = save_sentence_encoder(root / "tiny", save_encoder(root / "plain"), pooling, normalize=True, **settings)
    base = export_base(model, root / "out").base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 3, **TASK)
    export_adapter(write_adapter(root / "soft", adapter), root / "out")
    return model, root / "out"


def outcome(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> suite.Report:
    monkeypatch.setattr(suite, "check_swaps", lambda *_: ([], {}))  # fresh processes, of which this is not about
    return suite.verify(folder, str(model), {}, suite.VerifyOptions(threads=1, quick=True))


def failures(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    return {check.name for check in outcome(model, folder, monkeypatch).checks if not check.passed}


def test_clean_encoder_passes(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    report = outcome(*clean, monkeypatch)
    assert all(check.passed for check in report.checks)
    assert {"base/pooling-settings", *BOTH} <= {check.name for check in report.checks}


TRUE_POOL, TRUE_CUT = text_encoder.pool, Tokenizer.encode_cut

POOLS: dict[str, Callable[..., Any]] = {
    "not normalised": lambda states, modes, skip, normalize: TRUE_POOL(states, modes, skip),
    "prompt pooled": lambda states, modes, skip, normalize: TRUE_POOL(states, modes, 0, normalize=normalize),
    "one token missing": lambda states, modes, skip, normalize: TRUE_POOL(
        states[:-1], modes, skip, normalize=normalize
    ),
    "other order": lambda states, modes, skip, normalize: TRUE_POOL(states, modes[::-1], skip, normalize=normalize),
    "a thousandth more": lambda *given, **named: TRUE_POOL(*given, **named) * np.float32(1.001),
}


@pytest.mark.parametrize("fault", POOLS)
def test_states_pooled_otherwise(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(text_encoder, "pool", POOLS[fault])
    assert failures(*clean, monkeypatch) == BOTH


@pytest.mark.parametrize("fault", ["later", "left"])
def test_texts_cut_otherwise(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def encode_cut(self: Tokenizer, text: str, **named: Any) -> Any:
        changes = {"limit": named["limit"] + 1} if fault == "later" else {"left": True}
        return TRUE_CUT(self, text, **{**named, **changes})

    monkeypatch.setattr(Tokenizer, "encode_cut", encode_cut)
    assert failures(*clean, monkeypatch) == BOTH


def test_prompt_left_out(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    true = text_encoder.TextEncoder.tokenize
    without = lambda self, texts, tasks, _: true(self, texts, tasks, "")  # noqa: E731
    monkeypatch.setattr(text_encoder.TextEncoder, "tokenize", without)
    assert failures(*clean, monkeypatch) == BOTH


def test_task_that_is_not_applied(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    true = text_encoder.TextEncoder.tokenize

    def tokenize(self: Any, *given: Any) -> Any:
        return [replace(text, mapping=NO_ADAPTER) for text in true(self, *given)]

    monkeypatch.setattr(text_encoder.TextEncoder, "tokenize", tokenize)
    assert failures(*clean, monkeypatch) == BOTH - {"base/pooling"}


@pytest.mark.parametrize(
    "changes", [{"normalize": False}, {"modes": ("mean",)}, {"max_tokens": 29}, {"default_prompt": None}]
)
def test_settings_that_are_not_the_checkpoints(
    clean: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = shutil.copytree(clean[1], tmp_path / "out")
    base = read_manifest(folder).base
    assert base.pooling is not None
    reseal(folder, base=msgspec.structs.replace(base, pooling=msgspec.structs.replace(base.pooling, **changes)))
    assert failures(clean[0], folder, monkeypatch) == {"base/pooling-settings", *BOTH}


def test_deployment_of_an_older_kit(clean: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(clean[1], tmp_path / "out")
    reseal(folder, base=msgspec.structs.replace(read_manifest(folder).base, pooling=None))
    report = outcome(clean[0], folder, monkeypatch)
    assert report.passed
    assert [line for line in report.skipped if line.startswith("pooling")]
