"""`adalink verify` on an encoder that says how it pools: it passes, and planted faults are found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.sentences import save_encoder, save_sentence_encoder

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, text_encoder
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.tools.parity import suite
from adalink.tools.parity.checks.outputs import Comparison, Rows, compare_outputs
from adalink.tools.parity.checks.pooling import check_pooling, check_pooling_settings
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Report

TASK = {"rank": 3, "activation": "gelu", "bias": True, "scope": "all", "soft_tokens": 2}
PROMPTS = ["the price of corn fell in 3 months", "oil", "two words, at least"]
BOTH = {"base/pooling", "task/soft/pooling"}


@dataclass
class Verified:
    """A deployment, its model, and what the checks of pooling need of PyTorch, computed once."""

    model: Path
    folder: Path
    reference: Reference
    compared: dict[str | None, Comparison]

    def failures(self, folder: Path | None = None) -> set[str]:
        """Failed checks of pooling, with a deployment of the model opened anew."""
        report = Report()
        with Deployment.open(folder or self.folder, threads=1) as deployment:
            check_pooling_settings(report, deployment, self.reference)
            for task, compared in self.compared.items():
                label = "base" if task is None else f"task/{task}"
                with self.reference.adapted(adapter_of(self.folder, task)):
                    report.checks += check_pooling(label, task, deployment, self.reference, PROMPTS, compared)
        return {check.name for check in report.checks if not check.passed}


def adapter_of(folder: Path, task: str | None) -> Path | None:
    return None if task is None else (folder / read_manifest(folder).tasks[task].config).parent


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    root = tmp_path_factory.mktemp("clean")
    pooling = {"pooling_mode": ("mean", "weightedmean", "cls"), "include_prompt": False}
    settings = {"prompts": {"query": "query of me: "}, "default_prompt_name": "query", "max_seq_length": 30}
    model = save_sentence_encoder(root / "tiny", save_encoder(root / "plain"), pooling, normalize=True, **settings)
    base = export_base(model, root / "out").base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 3, **TASK)
    export_adapter(write_adapter(root / "soft", adapter), root / "out")
    reference, compared = Reference(model, base), {}
    with Deployment.open(root / "out", threads=1) as deployment:
        rows = [deployment.tokenizer.encode(prompt) for prompt in PROMPTS]
        for task in (None, "soft"):
            with reference.adapted(adapter_of(root / "out", task)):
                compared[task] = compare_outputs("", deployment, reference, task, Rows(rows))
    return Verified(model, root / "out", reference, compared)


def outcome(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(suite, "check_swaps", lambda *_: ([], {}))  # fresh processes, of which this is not about
    return suite.verify(folder, str(model), {}, suite.VerifyOptions(threads=1, quick=True))


def test_clean_encoder_passes(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the whole of verify, and in the part that the planted faults go through."""
    report = outcome(clean.model, clean.folder, monkeypatch)
    assert all(check.passed for check in report.checks)
    assert {"base/pooling-settings", *BOTH} <= {check.name for check in report.checks}
    assert clean.failures() == set()


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
def test_states_pooled_otherwise(clean: Verified, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(text_encoder, "pool", POOLS[fault])
    assert clean.failures() == BOTH


@pytest.mark.parametrize("fault", ["later", "left"])
def test_texts_cut_otherwise(clean: Verified, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def encode_cut(self: Tokenizer, text: str, **named: Any) -> Any:
        changes = {"limit": named["limit"] + 1} if fault == "later" else {"left": True}
        return TRUE_CUT(self, text, **{**named, **changes})

    monkeypatch.setattr(Tokenizer, "encode_cut", encode_cut)
    assert clean.failures() == BOTH


def test_prompt_left_out(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    true = text_encoder.TextEncoder.tokenize

    def without(self: Any, texts: Any, tasks: Any, prompt: str | None) -> Any:
        return true(self, texts, tasks, "")

    monkeypatch.setattr(text_encoder.TextEncoder, "tokenize", without)
    assert clean.failures() == BOTH


def test_task_that_is_not_applied(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    true = text_encoder.TextEncoder.tokenize

    def tokenize(self: Any, *given: Any) -> Any:
        return [replace(text, mapping=NO_ADAPTER) for text in true(self, *given)]

    monkeypatch.setattr(text_encoder.TextEncoder, "tokenize", tokenize)
    assert clean.failures() == BOTH - {"base/pooling"}


@pytest.mark.parametrize(
    "changes", [{"normalize": False}, {"modes": ("mean",)}, {"max_tokens": 29}, {"default_prompt": None}]
)
def test_settings_that_are_not_the_checkpoints(
    clean: Verified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = shutil.copytree(clean.folder, tmp_path / "out")
    base = read_manifest(folder).base
    assert base.pooling is not None
    reseal(folder, base=msgspec.structs.replace(base, pooling=msgspec.structs.replace(base.pooling, **changes)))
    assert clean.failures(folder) == {"base/pooling-settings", *BOTH}


def test_deployment_of_an_older_kit(clean: Verified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(clean.folder, tmp_path / "out")
    reseal(folder, base=msgspec.structs.replace(read_manifest(folder).base, pooling=None))
    report = outcome(clean.model, folder, monkeypatch)
    assert report.passed
    assert [line for line in report.skipped if line.startswith("pooling")]
