"""`adalink verify` on tasks whose labels a decoder says: clean ones pass, and planted faults are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_deployments import make_deployment

from adalink.runtime import Deployment, text_classifier
from adalink.runtime.label_scorer import LabelScorer
from adalink.runtime.storage.label_spec import LabelSet
from adalink.tools.parity import suite
from adalink.tools.parity.checks.labels import check_labels
from adalink.tools.parity.reference.model import Reference

LABELS = LabelSet(completions=(" oil", " oil and gas", " wheat", " x"))
TASKS: dict[str, dict[str, Any]] = {
    "topics": {"seed": 1, "labels": LABELS},
    "prompted": {"seed": 2, "scope": "prompt", "labels": LABELS},
    "plain": {"seed": 3},
}
TEXTS = ["the price of oil", "words, with 12 3", "b"]
SCORES = {"task/topics/labels", "task/prompted/labels"}
ANSWERS = {"task/topics/label-answers", "task/prompted/label-answers"}


@dataclass
class Verified:
    """A deployment and its base in PyTorch."""

    model: Path
    folder: Path
    reference: Reference

    def failures(self) -> set[str]:
        """Failed checks of labels, with the deployment opened anew; the noise is that of each position alone."""
        failed: set[str] = set()
        with Deployment.open(self.folder, threads=1) as deployment:
            for name, task in deployment.manifest.tasks.items():
                with self.reference.adapted((self.folder / task.config).parent):
                    checks = check_labels(name, deployment, self.reference, TEXTS, 1e-7)
                assert len(checks) == (2 if name != "plain" else 0)
                failed |= {check.name for check in checks if not check.passed}
        return failed


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    model, folder = make_deployment(tmp_path_factory.mktemp("labels"), "llama", TASKS)
    with Deployment.open(folder, threads=1) as deployment:
        return Verified(model, folder, Reference(model, deployment.manifest.base))


def test_clean_labels_pass(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the whole of verify, and in the part that the planted faults go through."""
    monkeypatch.setattr(suite, "check_swaps", lambda *_: ([], {}))  # fresh processes, of which this is not about
    report = suite.verify(clean.folder, str(clean.model), {}, suite.VerifyOptions(threads=1, quick=True))
    assert [check for check in report.checks if not check.passed] == []
    assert {check.name for check in report.checks} >= SCORES | ANSWERS
    assert clean.failures() == set()


TRUE_TARGETS, TRUE_FOLLOW = LabelScorer._targets, LabelScorer._follow


def _adapts_labels(scorer: LabelScorer, state: Any, prompt: Any, targets: Any) -> Any:
    """As if a task of scope `prompt` acted on the label too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer._runner.embedder, "for_decoding", lambda mapping: mapping)
        return TRUE_FOLLOW(scorer, state, prompt, targets)


FAULTS: dict[str, tuple[str, Callable[..., Any], set[str]]] = {
    "no end token": ("_targets", lambda scorer, label: TRUE_TARGETS(scorer, label)[:-1], SCORES),
    "labels without their space": ("_targets", lambda scorer, label: TRUE_TARGETS(scorer, label.strip()), SCORES),
    "prompts alone, on labels too": ("_follow", _adapts_labels, {"task/prompted/labels"}),
    "scores of another label": ("_follow", lambda *given: TRUE_FOLLOW(*given)[::-1], SCORES),
    "a mean over tokens": (
        "_follow",
        lambda scorer, state, prompt, targets: TRUE_FOLLOW(scorer, state, prompt, targets) / len(targets[0]),
        SCORES,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_scores_that_are_wrong(clean: Verified, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, wrong, expected = FAULTS[fault]
    monkeypatch.setattr(LabelScorer, name, wrong)
    assert expected <= clean.failures() <= expected | ANSWERS


def test_calibration_left_out(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    true = LabelScorer.prepare
    monkeypatch.setattr(LabelScorer, "prepare", lambda *given: [replace(row, neutral=None) for row in true(*given)])
    assert clean.failures() >= SCORES


@pytest.mark.parametrize("fault", ["names exchanged", "sharper"])
def test_answers_that_are_wrong(clean: Verified, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The scores are right."""
    true = text_classifier.PreparedPrompt.read

    def read(self: Any, scores: Any) -> Any:
        return true(self, scores[::-1] if fault == "names exchanged" else np.asarray(scores) * 1.1)

    monkeypatch.setattr(text_classifier.PreparedPrompt, "read", read)
    assert clean.failures() == ANSWERS
