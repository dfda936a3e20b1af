"""`adalink verify` on tasks with heads: clean ones pass, and planted faults are found by the heads' checks alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.heads import TASKS, make_head_deployment
from helpers.host_device import HostBackend

from adalink.export.base.export import export_base
from adalink.runtime import Deployment, text_classifier
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.tasks import head as head_module
from adalink.runtime.tasks.head import TaskHead
from adalink.runtime.text import truncation
from adalink.tools.parity import suite
from adalink.tools.parity.checks.head import check_head
from adalink.tools.parity.checks.outputs import Comparison, Rows, compare_outputs
from adalink.tools.parity.reference.model import Reference

HEADS = [name for name, settings in TASKS.items() if "head" in settings]
WEIGHTS = {f"adapter/{name}/head-weights" for name in HEADS}
SCORES, LABELS = {f"task/{name}/head" for name in HEADS}, {f"task/{name}/head-labels" for name in HEADS}


@dataclass
class Verified:
    """A deployment, its model, and what the heads' checks need of PyTorch, computed once."""

    model: Path
    folder: Path
    reference: Reference
    compared: dict[str, Comparison]
    prompts: list[str]

    def failures(self) -> set[str]:
        """Failed checks of heads, with the deployment opened anew."""
        failed: set[str] = set()
        with Deployment.open(self.folder, threads=1) as deployment:
            for name in HEADS:
                adapter = (self.folder / deployment.manifest.tasks[name].config).parent
                with self.reference.adapted(adapter):
                    checks = check_head(
                        name, {name: adapter}, deployment, self.reference, self.prompts, self.compared[name]
                    )
                failed |= {check.name for check in checks if not check.passed}
        return failed


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    model, folder, _ = make_head_deployment(tmp_path_factory.mktemp("heads"))
    prompts = ["the price of corn fell in 3 months", "oil", "two words, at least"]
    with Deployment.open(folder, threads=1) as deployment:
        reference = Reference(model, deployment.manifest.base)
        rows = [deployment.tokenizer.encode(prompt) for prompt in prompts]
        compared = {}
        for name in HEADS:
            with reference.adapted((folder / deployment.manifest.tasks[name].config).parent):
                compared[name] = compare_outputs(name, deployment, reference, name, Rows(rows))
    return Verified(model, folder, reference, compared, prompts)


def test_clean_heads_pass(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the whole of verify, and in the part that the planted faults go through."""
    monkeypatch.setattr(suite, "check_swaps", lambda *_: ([], {}))  # fresh processes, of which this is not about
    report = suite.verify(clean.folder, str(clean.model), {}, suite.VerifyOptions(threads=1, quick=True))
    assert [check for check in report.checks if not check.passed] == []
    assert {check.name for check in report.checks} >= WEIGHTS | SCORES | LABELS
    assert not [check.name for check in report.checks if check.name.startswith("control/frozen")]
    assert clean.failures() == set()


TRUE_SCORES = TaskHead.scores
ALL_BUT_TOKENS = SCORES - {"task/names/head"}

FAULTS: dict[str, tuple[Callable[[TaskHead, Any], Any], set[str]]] = {
    "no bias": (lambda head, states: TRUE_SCORES(replace(head, bias=head.bias * 0), states), SCORES),
    "rows exchanged": (
        lambda head, states: TRUE_SCORES(replace(head, weight=head.weight[::-1]), states),
        SCORES - {"task/rating/head"},
    ),
    "one weight by a hundredth": (
        lambda head, states: TRUE_SCORES(replace(head, weight=nudged(head.weight)), states),
        SCORES,
    ),
    "another pooling": (
        lambda head, states: TRUE_SCORES(replace(head, spec=pooled_otherwise(head.spec)), states),
        ALL_BUT_TOKENS,
    ),
}


def nudged(weight: Any) -> Any:
    changed = weight.copy()
    changed.flat[np.abs(changed).argmax()] *= np.float32(1.01)
    return changed


def pooled_otherwise(spec: Any) -> Any:
    return msgspec.structs.replace(spec, pooling="weightedmean") if spec.pooling else spec


@pytest.mark.parametrize("fault", FAULTS)
def test_scores_that_are_wrong(clean: Verified, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    scores, expected = FAULTS[fault]
    monkeypatch.setattr(TaskHead, "scores", scores)
    found = clean.failures()
    assert expected <= found <= expected | LABELS | WEIGHTS
    assert fault == "another pooling" or len(found & WEIGHTS) >= 4


def test_smallest_weight_by_a_hundredth(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the unit vectors, which real widths need: few of the tiny model's scores change enough."""

    def scores(head: TaskHead, states: Any) -> Any:
        weight = head.weight.copy()
        weight.flat[np.abs(weight).argmin()] *= np.float32(1.01)
        return TRUE_SCORES(replace(head, weight=weight), states)

    monkeypatch.setattr(TaskHead, "scores", scores)
    found = clean.failures()
    assert found >= WEIGHTS
    assert len(found & SCORES) < len(SCORES)


def test_texts_cut_a_token_later(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    true = truncation._shares
    monkeypatch.setattr(truncation, "_shares", lambda first, second, room: true(first, second, room + 1))
    assert clean.failures() >= SCORES


def test_pairs_cut_otherwise(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first text alone, rather than the longer one."""
    monkeypatch.setattr(truncation, "_shares", lambda first, second, room: (min(first, room), room - min(first, room)))
    assert clean.failures() >= ALL_BUT_TOKENS


def test_head_of_another_task(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    true = head_module.head_of
    first: list[TaskHead] = []

    def head_of(adapter: Any) -> TaskHead | None:
        head = true(adapter)
        if head is not None and len(head.spec.labels) == 3:
            first.append(head)
            return first[0]
        return head

    monkeypatch.setattr("adalink.runtime.tasks.registry.head_of", head_of)
    assert clean.failures() & SCORES in ({"task/topics/head"}, {"task/frozen/head"})


def test_names_of_labels_exchanged(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are right."""
    true = text_classifier.PreparedText.read

    def read(self: Any, scores: Any) -> Any:
        spec = self.head.spec
        if spec.problem_type == "token_classification":
            labels = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
        else:
            labels = spec.labels[::-1]
        return true(replace(self, head=replace(self.head, spec=msgspec.structs.replace(spec, labels=labels))), scores)

    monkeypatch.setattr(text_classifier.PreparedText, "read", read)
    assert clean.failures() == LABELS - {"task/rating/head-labels"}


def test_spans_a_character_late(clean: Verified, monkeypatch: pytest.MonkeyPatch) -> None:
    true = text_classifier.read_spans

    def read_spans(*given: Any) -> Any:
        return tuple(replace(span, start=span.start + 1) for span in true(*given))

    monkeypatch.setattr(text_classifier, "read_spans", read_spans)
    assert clean.failures() == {"task/names/head-labels"}


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_probabilities_of_another_kind(clean: Verified, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    true = getattr(text_classifier, function)
    monkeypatch.setattr(text_classifier, function, lambda scores: true(scores * 1.1))
    names = {"softmax": {"topics", "frozen"}, "sigmoid": {"colours"}}[function]
    assert clean.failures() == {f"task/{name}/head-labels" for name in names}


def test_heads_on_a_device(clean: Verified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind an engine whose memory stays on a device, and which takes few rows at a time."""
    folder = shutil.copytree(clean.folder, tmp_path / "out")
    export_base(clean.model, folder, target="portable")
    profile = Profile(batch=ShapeRange(1, 2, 4), seq=ShapeRange(1, 8, 64), past=None)
    monkeypatch.setattr("adalink.runtime.deployment.open_backend", lambda *_: HostBackend(profile))
    texts, tasks = (
        [f"{number} texts of some length " * (1 + number % 2) for number in range(11)],
        [*HEADS, *HEADS, None],
    )
    with Deployment.open(folder, variant="portable") as deployment:
        assert deployment.profile is not None
        got = deployment.text_classifier.scores(deployment.text_classifier.prepare(texts[:10], tasks[:10]))
        vectors = deployment.encode(texts, tasks, pooling="mean")
    monkeypatch.undo()
    with Deployment.open(clean.folder, threads=1) as deployment:
        wanted = deployment.text_classifier.scores(deployment.text_classifier.prepare(texts[:10], tasks[:10]))
        assert vectors == pytest.approx(deployment.encode(texts, tasks, pooling="mean"), abs=2e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
