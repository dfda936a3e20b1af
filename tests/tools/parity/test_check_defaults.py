"""What `adalink verify` says of generation defaults: planted manifests that the engine's logits say nothing about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.runtime import reseal
from helpers.tiny_deployments import make_model_folder

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.checks.defaults import check_defaults
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Report

SETTINGS = {"repetition_penalty": 1.4, "min_new_tokens": 5, "suppress_tokens": [30, 40], "num_beams": 3}
SETTINGS |= {"stop_strings": ["never there"]}


class Case:
    """A checkpoint with a generation config, and its deployment."""

    def __init__(self, root: Path, family: str) -> None:
        self.model = make_model_folder(root / "model", family)
        config = self.model / "generation_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | SETTINGS))
        self.folder = root / "deployment"
        self.base = export_base(self.model, self.folder).base
        self.reference = Reference(self.model, self.base)

    def report(self, **changes: Any) -> Report:
        """What is found where the manifest's defaults were changed so."""
        generation = self.base.generation
        if changes:
            assert generation is not None
            generation = None if "generation" in changes else msgspec.structs.replace(generation, **changes)
        reseal(self.folder, base=msgspec.structs.replace(read_manifest(self.folder).base, generation=generation))
        rng, report = np.random.default_rng(3), Report()
        with Deployment.open(self.folder, threads=1) as deployment:
            check_defaults(report, deployment, self.reference, [rng.integers(4, 96, 9).tolist() for _ in range(4)])
        return report


@pytest.fixture(scope="module", params=["llama", "t5"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_right_defaults_pass(case: Case) -> None:
    (check,) = case.report().checks
    assert check.passed, check.detail


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": None},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 1},
        {"stop_strings": tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")},
    ],
)
def test_wrong_defaults_fail(case: Case, changes: dict[str, Any]) -> None:
    (check,) = case.report(**changes).checks
    assert not check.passed
    assert "transformers" in check.detail


def test_older_bases_are_skipped(case: Case) -> None:
    report = case.report(generation=None)
    assert not report.checks
    assert "older kit" in report.skipped[0]
