"""`adalink verify` on pairs of texts: clean encoders pass, and a planted fault is found by the pairs alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.host_device import HostBackend
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_pair_tokenizer, make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base import files
from adalink.export.base.export import export_base
from adalink.runtime.device.engine import DeviceEngine
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.tools.parity import suite

SOFT = {"rank": 2, "activation": "gelu", "bias": True, "scope": "all", "soft_tokens": 3}
PAIRS = {"base/pairs/last_hidden_state", "task/soft/pairs/last_hidden_state"}


def save(root: Path, tokenizer: Any) -> tuple[Path, Path]:
    """A model folder, and a deployment with one task whose adapter has a soft prompt."""
    model = root / "tiny"
    FAMILIES["bert"]().save_pretrained(model)
    tokenizer.save_pretrained(model)
    base = export_base(model, root / "out").base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 3, **SOFT)
    export_adapter(write_adapter(root / "soft", adapter), root / "out")
    return model, root / "out"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save(tmp_path_factory.mktemp("clean"), make_pair_tokenizer())


def outcome(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> suite.Report:
    monkeypatch.setattr(suite, "check_swaps", lambda *_: ([], {}))  # fresh processes, of which this is not about
    return suite.verify(folder, str(model), {}, suite.VerifyOptions(threads=1, quick=True, **options))


def failures(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> set[str]:
    report = outcome(model, folder, monkeypatch, **options)
    return {check.name for check in report.checks if not check.passed}


def test_clean_pairs_pass(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    report = outcome(*clean, monkeypatch)
    assert all(check.passed for check in report.checks)
    assert {"base/pair-tokens", *PAIRS} <= {check.name for check in report.checks}


def test_types_that_are_not_fed(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    true = ModelRunner.feeds

    def feeds(self: ModelRunner, *arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in true(self, *arguments).items() if name != "token_type_ids"}

    monkeypatch.setattr(ModelRunner, "feeds", feeds)
    assert failures(*clean, monkeypatch) == PAIRS


def test_a_soft_prompt_of_the_second_text(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    true = SoftPromptLayout.place

    def place(self: SoftPromptLayout, values: Any) -> Any:
        return true(self, values) | (self.mask - true(self, np.ones_like(values)))

    monkeypatch.setattr(SoftPromptLayout, "place", place)
    assert failures(*clean, monkeypatch) == PAIRS - {"base/pairs/last_hidden_state"}


@pytest.mark.parametrize("fault", ["types", "order"])
def test_texts_joined_otherwise(clean: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    true = Tokenizer.encode_pair

    def encode_pair(self: Tokenizer, text: str, text_pair: str | None = None) -> tuple[list[int], list[int]]:
        if fault == "order" and text_pair is not None:
            text, text_pair = text_pair, text
        ids, types = true(self, text, text_pair)
        return ids, [0] * len(ids) if fault == "types" else types

    monkeypatch.setattr(Tokenizer, "encode_pair", encode_pair)
    assert failures(*clean, monkeypatch) == {"base/pair-tokens"}


def test_a_tokenizer_without_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The types are seeded then: those of the model's table are checked all the same."""
    model, folder = save(tmp_path, make_tokenizer())
    report = outcome(model, folder, monkeypatch)
    assert all(check.passed for check in report.checks)
    assert {"base/pair-tokens", *PAIRS} <= {check.name for check in report.checks}


def test_a_deployment_of_an_older_kit_says_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_token_types", lambda *_: None)
    report = outcome(*save(tmp_path, make_pair_tokenizer()), monkeypatch)
    assert all(check.passed for check in report.checks)
    assert not [check.name for check in report.checks if "pair" in check.name]
    assert [line for line in report.skipped if line.startswith("pairs of texts")]


def test_types_of_an_earlier_call_left_on_a_device(
    clean: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an engine whose memory stays on a device is verified with pairs."""
    model, folder = clean[0], shutil.copytree(clean[1], tmp_path / "out")
    export_base(model, folder, target="portable")
    profile = Profile(batch=ShapeRange(1, 2, 8), seq=ShapeRange(1, 8, 64), past=None)
    monkeypatch.setattr(suite, "open_backend", lambda *_: HostBackend(profile))
    monkeypatch.setattr("adalink.runtime.deployment.open_backend", lambda *_: HostBackend(profile))
    assert read_manifest(folder).variants["portable"]
    assert not failures(model, folder, monkeypatch, variant="portable")
    true = DeviceEngine._passes
    monkeypatch.setattr(DeviceEngine, "_passes", lambda self, *given: true(self, *given[:-1], None))
    assert failures(model, folder, monkeypatch, variant="portable") == PAIRS
