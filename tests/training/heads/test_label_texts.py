"""`--head none`: the bottleneck learns towards the embeddings of label texts, against transformers in float64."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sentences import save_encoder
from transformers import AutoModel, AutoTokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import ConfigError, Deployment, ModelError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training import AdaLinkConfig, HeadSettings, TrainSettings, load_adapter, train
from adalink.training.models.loading import load_base

SETTINGS = TrainSettings(max_steps=80, batch_size=8, max_length=40, lr=1e-2, device="cpu", save_steps=1000)
CONFIG = AdaLinkConfig(rank=4)
NONE = HeadSettings(kind="none")
WORDS = ("oil", "corn", "gold", "tin", "rye", "wheat")
LABELS = ("metal", "oil")


def rows(seed: int, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    chosen = [[WORDS[number] for number in rng.integers(0, len(WORDS), rng.integers(2, 5))] for _ in range(count)]
    return [{"text": " ".join(words), "label": LABELS["oil" in words]} for words in chosen]


def write(path: Path, some: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("base") / "tiny")


def mean_states(model: Any, tokenizer: Any, text: str) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().mean(0))


def test_says_the_nearest_label(base: Path, tmp_path: Path) -> None:
    training, test = rows(0, 80), rows(1, 40)
    data, held_out = write(tmp_path / "train.jsonl", training), write(tmp_path / "eval.jsonl", test)
    report = train(base, data, held_out, tmp_path / "near", CONFIG, SETTINGS, head=NONE)
    assert report["settings"]["head"] == "none"
    assert report["evaluation"]["accuracy"] > report["evaluation"]["majority_accuracy"] + 0.15

    exact, tokenizer = AutoModel.from_pretrained(base).double().eval(), AutoTokenizer.from_pretrained(base)
    wanted = np.stack([mean_states(exact, tokenizer, label) for label in LABELS])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    weights = read_adapter(tmp_path / "near").weights
    length = np.mean([np.linalg.norm(mean_states(exact, tokenizer, row["text"])) for row in training])
    assert weights["head.weight"] == pytest.approx(wanted * 20 / length, abs=1e-4)
    assert not weights["head.bias"].any()

    export_base(base, tmp_path / "out")
    export_adapter(tmp_path / "near", tmp_path / "out")
    with Deployment.open(tmp_path / "out", threads=1) as deployment:
        said = deployment.classify([row["text"] for row in test], "near")
    model = load_base(base)
    with load_adapter(tmp_path / "near", model):
        states = np.stack([mean_states(model, tokenizer, row["text"]) for row in test])
    cosines = states @ wanted.T / np.linalg.norm(states, axis=1, keepdims=True)
    assert [one.label for one in said] == [LABELS[place] for place in cosines.argmax(1)]
    assert len({one.label for one in said}) == 2


@pytest.mark.parametrize(
    ("row", "config", "options", "message"),
    [
        ({"labels": ["oil"]}, CONFIG, NONE, "head is 'none' for multi_label_classification"),
        ({"label": 2.5}, CONFIG, NONE, "head is 'none' for regression"),
        ({"label": "oil"}, CONFIG, HeadSettings(kind="none", alone=True), "leaves nothing to train"),
        ({"label": "oil"}, AdaLinkConfig(rank=0, soft_tokens=2), HeadSettings(kind="none", alone=True), "nothing to"),
    ],
)
def test_what_has_no_nearest_label(
    base: Path, tmp_path: Path, row: dict[str, Any], config: AdaLinkConfig, options: HeadSettings, message: str
) -> None:
    other = {"label": "tin"} if row == {"label": "oil"} else row
    data = write(tmp_path / "rows.jsonl", [{"text": "oil", **row}, {"text": "tin", **other}])
    with pytest.raises(ConfigError, match=message):
        train(base, data, data, tmp_path / "out", config, SETTINGS, head=options)
    with pytest.raises(ConfigError, match="head is 'cosine', expected one of linear, none"):
        HeadSettings(kind="cosine")


def test_labels_with_one_embedding(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"text": "oil", "label": "a tin"}, {"text": "corn", "label": "a  tin"}])
    with pytest.raises(ModelError, match="embeds labels 'a  tin' and 'a tin' alike"):
        train(base, data, data, tmp_path / "out", CONFIG, SETTINGS, head=NONE)
    assert sorted(tmp_path.iterdir()) == [data]
