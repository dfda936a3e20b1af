"""The head that a run starts from is scikit-learn's regression on the states that transformers itself gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sentences import save_encoder
from sklearn.linear_model import LogisticRegression, Ridge
from transformers import AutoModel, AutoTokenizer

from adalink.runtime.storage.head_spec import MULTI_LABEL, OUTSIDE, REGRESSION, SINGLE_LABEL, TOKENS, Head
from adalink.training import TrainSettings
from adalink.training.data.labelled_rows import LabelledRow, LabelledSpan
from adalink.training.heads import linear_probe
from adalink.training.heads.classifier import LabelCollator, TrainableClassifier, encode_labelled
from adalink.training.heads.linear_probe import fit_head
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base, load_tokenizer

WORDS = ["oil", "corn", "gold", "tin", "rye", "wheat"]
LABELS = {
    SINGLE_LABEL: ("a", "b", "c"),
    MULTI_LABEL: ("a", "b"),
    REGRESSION: ("score",),
    TOKENS: (OUTSIDE, "B-M", "I-M"),
}
SETTINGS = TrainSettings(max_steps=100, batch_size=7, max_length=40, device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("base") / "tiny")


def rows_of(kind: str) -> list[LabelledRow]:
    rng = np.random.default_rng(5)
    rows = []
    for line in range(60):
        words = [WORDS[number] for number in rng.integers(0, len(WORDS), rng.integers(2, 6))]
        text, made = " ".join(words), dict[str, Any]()
        if kind == SINGLE_LABEL:
            made["labels"] = ("a" if "oil" in words else "b" if "corn" in words else "c",)
        elif kind == MULTI_LABEL:
            made["labels"] = tuple(name for name, word in (("a", "oil"), ("b", "corn")) if word in words)
        elif kind == REGRESSION:
            made["value"] = float(words.count("tin")) - 0.5
        else:
            begin, count = int(rng.integers(0, len(words))), int(rng.integers(1, 3))
            start = len(" ".join([*words[:begin], ""]))
            made["spans"] = (LabelledSpan(start, start + len(" ".join(words[begin : begin + count])), "M"),)
        rows.append(LabelledRow(text=text, line=line, **made))
    return rows


def fitted(base: Path, kind: str, settings: TrainSettings = SETTINGS) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    tokenizer, model = load_tokenizer(base), load_base(base)
    head = Head(problem_type=kind, labels=LABELS[kind], pooling="" if kind == TOKENS else "mean", max_tokens=40)
    examples = encode_labelled(rows_of(kind), tokenizer, head)
    torch.manual_seed(1)
    with attach(model, AdaLinkConfig(rank=3, head=head)) as attached:
        module = TrainableClassifier(attached)
        before = [one.clone() for one in module.adapters.parameters()]
        fit_head(module, examples, LabelCollator(head, 0), settings)
        assert all(map(torch.equal, before, module.adapters.parameters()))
        return module.head.weight.detach().numpy(), module.head.bias.detach().numpy(), examples


def states_of(base: Path, kind: str, examples: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The same by transformers alone, one text at a time."""
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    states, targets = [], []
    for row, example in zip(rows_of(kind), examples, strict=True):
        with torch.no_grad():
            own = model(**tokenizer(row.text, return_tensors="pt")).last_hidden_state[0].numpy()
        if kind == TOKENS:
            kept = [number for number, target in enumerate(example.target) if target >= 0]
            states += [own[number] for number in kept]
            targets += [example.target[number] for number in kept]
        else:
            states.append(own.mean(axis=0))
            targets.append(example.target)
    return np.asarray(states, np.float64), np.asarray(targets)


def reference(kind: str, states: np.ndarray, targets: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    length = np.linalg.norm(states, axis=1).mean()
    scaled = states / length
    if kind == REGRESSION:
        model = Ridge(alpha=1 / strength).fit(scaled, targets)
        return model.coef_[None] / length, np.atleast_1d(model.intercept_)
    options = {"C": strength, "tol": 1e-9, "max_iter": 10_000}
    if kind == MULTI_LABEL:
        models = [LogisticRegression(**options).fit(scaled, column) for column in targets.T]
        return np.concatenate([one.coef_ for one in models]) / length, np.concatenate(
            [one.intercept_ for one in models]
        )
    model = LogisticRegression(**options).fit(scaled, targets)
    return model.coef_ / length, model.intercept_


@pytest.mark.parametrize("kind", LABELS)
def test_scores_are_those_of_scikit_learn(base: Path, kind: str) -> None:
    weight, bias, examples = fitted(base, kind)
    states, targets = states_of(base, kind, examples)

    def distance(strength: float) -> float:
        other_weight, other_bias = reference(kind, states, targets, strength)
        scores, expected = states @ weight.T.astype(np.float64) + bias, states @ other_weight.T + other_bias
        if kind in (SINGLE_LABEL, TOKENS):  # all scores of a row may move together
            scores, expected = (one - one.mean(axis=1, keepdims=True) for one in (scores, expected))
        return float(np.abs(scores - expected).max() / np.abs(expected).max())

    assert distance(linear_probe.STRENGTH) < 2e-3
    assert distance(linear_probe.STRENGTH / 2) > 0.02  # another strength is seen


def test_no_more_rows_are_read_than_the_run_reads(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(base, SINGLE_LABEL)[0]
    part = fitted(base, SINGLE_LABEL, TrainSettings(max_steps=3, batch_size=7, max_length=40, device="cpu"))[0]
    assert np.abs(whole - part).max() > 1e-3
    monkeypatch.setattr(linear_probe, "MAX_STATES", 21)
    np.testing.assert_array_equal(fitted(base, SINGLE_LABEL)[0], part)
