"""`Deployment.classify` on bases that generate, against log-likelihoods in PyTorch in float64, without a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime import Tiny, random_adapter, write_adapter

from adalink.runtime import BackendError, ConfigError, Deployment, RequestError
from adalink.runtime.storage.label_spec import LabelSet
from adalink.runtime.text_classifier import TextClassifier

LABELS = (" oil", " oil and gas", " wheat", " a long label", " x")
NAMES = tuple(label.strip() for label in LABELS)
TEXTS = ["the price of oil", "b", "words, with 12 3"]
TASKS = ["alpha", "prompted", None]


@pytest.fixture(scope="module")
def opened(llama: Tiny) -> Iterator[Deployment]:
    with Deployment.open(llama.folder, threads=1) as deployment:
        yield deployment


def in_pytorch(tiny: Tiny, opened: Deployment, text: str, task: str | None, labels: tuple[str, ...]) -> np.ndarray:
    """Log-likelihood of each label and its end token, each in a whole sequence of its own."""
    exact = copy.deepcopy(tiny.model).double()
    scope = tiny.adapters[task].config.scope if task else "all"
    prompt = opened.tokenizer.encode(text)
    scores = []
    for label in labels:
        ids = opened.tokenizer.encode_plain(label)
        parts = [tiny.embeds(prompt, task), tiny.embeds(ids, task if scope == "all" else None)]
        with torch.no_grad():
            logits = exact(inputs_embeds=torch.cat(parts, 1).double()).logits[0, len(prompt) - 1 :]
        shares = logits.log_softmax(-1)
        end = torch.logsumexp(shares[-1, list(opened.manifest.base.eos_token_ids)], 0)
        scores.append(float(sum(shares[place, token] for place, token in enumerate(ids)) + end))
    return np.array(scores)


@pytest.mark.parametrize("shares_cache", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_pytorch(
    llama: Tiny, opened: Deployment, task: str | None, shares_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shares_cache:
        monkeypatch.setattr(opened._runner, "slot_engine", None)
    classifier = opened.text_classifier
    got = classifier.scores(classifier.prepare(TEXTS, task, LABELS))
    for text, scores in zip(TEXTS, got, strict=True):
        assert scores == pytest.approx(in_pytorch(llama, opened, text, task, LABELS), abs=2e-4)


def test_prompt_is_read_once(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, start = [], opened._runner.start
    monkeypatch.setattr(
        opened._runner, "start", lambda batch, most: shapes.append(batch.inputs.ids.shape[0]) or start(batch, most)
    )
    opened.classify(TEXTS, labels=LABELS)
    assert shapes == [1, 1, 1]


def test_probabilities_are_the_labels_alone(llama: Tiny, opened: Deployment) -> None:
    wanted = [in_pytorch(llama, opened, text, "alpha", LABELS) for text in TEXTS]
    for one, scores in zip(opened.classify(TEXTS, "alpha", labels=LABELS), wanted, strict=True):
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        assert tuple(one.probabilities) == NAMES
        assert list(one.probabilities.values()) == pytest.approx(shares, abs=2e-4)
        assert one.label == NAMES[int(scores.argmax())]


def test_calibration_divides_by_a_prompt_without_content(llama: Tiny, opened: Deployment) -> None:
    tasks = ["alpha", "beta", "alpha"]
    classifier = opened.text_classifier
    got = classifier.scores(classifier.prepare(TEXTS, tasks, LABELS, "N/A"))
    for text, task, scores in zip(TEXTS, tasks, got, strict=True):
        wanted = in_pytorch(llama, opened, text, task, LABELS) - in_pytorch(llama, opened, "N/A", task, LABELS)
        assert scores == pytest.approx(wanted, abs=4e-4)
    (same,) = opened.classify(["N/A"], "beta", labels=LABELS, calibration="N/A")
    assert list(same.probabilities.values()) == pytest.approx([0.2] * 5, abs=1e-9)


def test_more_labels_than_share_a_state(llama: Tiny, opened: Deployment) -> None:
    many = tuple(f" label {number}" for number in range(40))
    classifier = opened.text_classifier
    (got,) = classifier.scores(classifier.prepare(["oil"], "beta", many))
    assert got == pytest.approx(in_pytorch(llama, opened, "oil", "beta", many), abs=4e-4)


def test_tasks_keep_their_labels(llama: Tiny, tmp_path: Path) -> None:
    kept = {"rank": 3, "activation": "gelu", "bias": False, "scope": "all"}
    with Deployment.open(llama.folder, threads=1) as deployment:
        base = deployment.manifest.base
        for seed, (name, labels) in enumerate({"first": LABELS, "second": LABELS[:2]}.items()):
            adapter = random_adapter(
                base.fingerprint, base.hidden_size, seed, **kept, labels=LabelSet(completions=labels)
            )
            deployment.add_task(write_adapter(tmp_path / name, adapter), name)
        first, second = deployment.classify(["oil", "oil"], ["first", "second"])
        assert (tuple(first.probabilities), tuple(second.probabilities)) == (NAMES, NAMES[:2])
        assert first.tokens == len(deployment.tokenizer.encode("oil"))


def test_labels_of_an_encoder_decoder(t5: Tiny) -> None:
    with Deployment.open(t5.folder, threads=1) as deployment:
        classifier = deployment.text_classifier
        (got,) = classifier.scores(classifier.prepare(["the price of oil"], "alpha", LABELS))
        base, ids = deployment.manifest.base, deployment.tokenizer.encode("the price of oil")
        exact = copy.deepcopy(t5.model).double()
        for label, score in zip(LABELS, got, strict=True):
            target = deployment.tokenizer.encode_plain(label)
            with torch.no_grad():
                shares = exact(
                    inputs_embeds=t5.embeds(ids, "alpha").double(),
                    decoder_input_ids=torch.tensor([[base.decoder_start_token_id, *target]]),
                ).logits[0].log_softmax(-1)  # fmt: skip
            end = torch.logsumexp(shares[-1, list(base.eos_token_ids)], 0)
            wanted = sum(shares[place, token] for place, token in enumerate(target)) + end
            assert score == pytest.approx(float(wanted), abs=2e-4)


def test_logits_that_are_not_numbers(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    table = opened._runner.engine.embedder
    monkeypatch.setattr(table, "lookup", lambda ids, *rest: np.full((*ids.shape, 48), np.nan, np.float32))
    with pytest.raises(BackendError, match="expected numbers"):
        opened.classify(["oil"], labels=LABELS)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a"], {"tasks": "alpha"}, "text 0: task 'alpha' has no labels"),
        (["a"], {}, "text 0: the base model has no labels"),
        (["a"], {"labels": [" one"]}, "expected 2 to"),
        (["a"], {"labels": [" one", "one"]}, "different texts"),
        (["a"], {"labels": "ab"}, "expected a list of texts"),
        ([("a", "b")], {"labels": LABELS}, "text 0 is a pair"),
        ([""], {"labels": LABELS}, "prompt 0 has no tokens"),
        (["oil " * 500], {"labels": LABELS}, "positions"),
        (["a"], {"labels": LABELS, "calibration": "oil " * 500}, "positions"),
    ],
)
def test_wrong_arguments(opened: Deployment, texts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        opened.classify(texts, **options)


def test_planted_faults_are_seen(llama: Tiny, opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the end token, and with label tokens adapted that are not: the reference notices."""
    wanted = in_pytorch(llama, opened, TEXTS[0], "prompted", LABELS)
    scorer = opened.text_classifier._scorer
    true = scorer._targets
    monkeypatch.setattr(scorer, "_targets", lambda label: true(label)[:-1])
    (got,) = scorer.scores(scorer.prepare(TEXTS[:1], "prompted", LabelSet(completions=LABELS), None))
    assert np.abs(got - wanted).min() > 1e-2
    monkeypatch.undo()
    embedder = opened._runner.embedder
    monkeypatch.setattr(embedder, "for_decoding", lambda mapping: mapping)
    (got,) = scorer.scores(scorer.prepare(TEXTS[:1], "prompted", LabelSet(completions=LABELS), None))
    assert np.abs(got - wanted).max() > 1e-2


def test_labels_beside_a_head_or_of_one_name() -> None:
    settings: dict[str, Any] = {"rank": 2, "activation": "gelu", "bias": False, "scope": "all"}
    with pytest.raises(ConfigError, match="expected 2 to"):
        random_adapter("sha256:" + "0" * 64, 48, 0, **settings, labels=LabelSet(completions=("a", " a")))


def test_classifier_is_the_deployments(opened: Deployment) -> None:
    assert isinstance(opened.text_classifier, TextClassifier)
    assert opened.classify([], labels=LABELS) == []
