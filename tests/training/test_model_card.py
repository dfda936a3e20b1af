"""The adapter folder that a training writes: what lies beside the adapter, and that nothing minds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.sentences import save_encoder
from helpers.studies import write_base
from huggingface_hub import ModelCard

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS
from adalink.tools.evaluation.report import Report
from adalink.tools.evaluation.trained import PAGE_FILE, make_page, make_training_report
from adalink.training.loop.options import LoopOptions
from adalink.training.method.config import AdaLinkConfig
from adalink.training.outcome import Outcome
from adalink.training.run import train
from adalink.training.settings import TrainSettings

SETTINGS = TrainSettings(lr=1e-2, max_steps=10, batch_size=8, max_length=24, device="cpu")
EVIL = "<script>alert(1)</script>|`*x*`"
ROWS: dict[str, list[dict[str, Any]]] = {
    SINGLE_LABEL: [{"text": f"oil {n}", "label": ("oil", EVIL)[n % 2]} for n in range(24)],
    MULTI_LABEL: [{"text": f"oil {n}", "labels": [["oil"], ["oil", "tin"], []][n % 3]} for n in range(24)],
    REGRESSION: [{"text": "oil " * (n % 3 + 1) + str(n), "label": n % 3 + 0.5} for n in range(24)],
    TOKENS: [{"text": f"oil {n}", "spans": [{"start": 0, "end": 3, "label": "THING"}]} for n in range(24)],
    "text": [{"prompt": f"oil {n}:", "completion": ("oil", "tin")[n % 2]} for n in range(24)],
}
TAGS = {TOKENS: "token-classification", "text": "text-generation"}


class Trained:
    """A trained task, its folder and what the page was made of."""

    def __init__(self, kind: str, base: Path, root: Path) -> None:
        data, self.folder = root / f"{kind}.jsonl", root / f"my {kind}"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
        outcomes: list[Outcome] = []

        def make(outcome: Outcome) -> dict[str, bytes]:
            outcomes.append(outcome)
            return dict(make_page(outcome))

        loop = LoopOptions(show_bar=False, extra_files=make)
        self.record = train(base, data, None, self.folder, AdaLinkConfig(rank=4), SETTINGS, loop=loop)
        self.report: Report = make_training_report(outcomes[0])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bases")
    return save_encoder(root / "tiny-encoder"), write_base(root / "tiny-llama")


@pytest.fixture(scope="module", params=ROWS)
def trained(
    request: pytest.FixtureRequest, bases: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Trained]:
    kind = request.param
    return kind, Trained(kind, bases[kind == "text"], tmp_path_factory.mktemp("out"))


def test_card_has_the_hubs_metadata(trained: tuple[str, Trained]) -> None:
    kind, made = trained
    card = ModelCard.load(made.folder / "README.md")
    assert card.data.base_model == ("tiny-llama" if kind == "text" else "tiny-encoder")
    assert card.data.library_name == "adalink-kit"
    assert card.data.pipeline_tag == TAGS.get(kind, "text-classification")
    measured = made.record.get("evaluation") or {"exact_match": made.record["exact_match"]["adapter"]}
    results = {one.metric_name.replace(" ", "_"): one for one in card.data.eval_results}
    assert measured.keys() - results.keys() <= {"majority_accuracy", "mean_squared_error_of_the_mean"}
    assert results
    for name, one in results.items():
        assert one.metric_value == pytest.approx(measured[name], abs=1e-6)
        assert one.dataset_name == f"{kind}.jsonl"
    assert str(made.folder.parent) not in card.content
    assert "adalink export adapter" in card.text


def test_page_says_what_the_report_says(trained: tuple[str, Trained]) -> None:
    """The page measures with scikit-learn and sets, the report with NumPy."""
    kind, made = trained
    (task,) = made.report.tasks
    page = (made.folder / PAGE_FILE).read_text(encoding="utf-8")
    record = made.record
    if kind == "text":
        assert task.accuracy is not None
        assert task.accuracy.value == record["exact_match"]["adapter"]
        assert task.reference is not None
        assert task.reference.value == record["exact_match"]["base"]
        assert task.labels is not None
        assert task.labels.calibration_error is None
    elif task.numbers is not None:
        assert task.numbers.mean_absolute_error.value == pytest.approx(record["evaluation"]["mean_absolute_error"])
        assert task.numbers.pearson == pytest.approx(record["evaluation"]["pearson"])
    elif task.items is not None:
        names = ("span_f1", "span_macro_f1") if kind == TOKENS else ("micro_f1", "macro_f1")
        got = (task.items.f1.value, task.items.macro_f1)
        assert got == pytest.approx(tuple(record["evaluation"][name] for name in names))
    else:
        assert task.labels is not None
        assert task.accuracy is not None
        assert task.accuracy.value == pytest.approx(record["evaluation"]["accuracy"])
        assert task.labels.macro_f1.value == pytest.approx(record["evaluation"]["macro_f1"])
        assert task.reference is not None
        assert task.reference.value == record["evaluation"]["majority_accuracy"]
        card = (made.folder / "README.md").read_text(encoding="utf-8")
        assert f"(always their commonest label: {task.reference.value:.4f})" in card
    assert made.report.training is not None
    assert [point.value for point in made.report.training.eval_loss] == [
        point["loss"] for point in record["eval_curve"]
    ]
    assert "Loss by step" in page
    assert "<script" not in page
    assert re.search(r"Written by adalink train, AdaLink Kit", page)
    assert "ms in the median" not in page  # PyTorch's times are not those of a deployment


@pytest.fixture(scope="module")
def deployments(bases: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("deployments")
    for base in bases:
        export_base(base, root / base.name)
    return root / bases[0].name, root / bases[1].name


def test_files_beside_the_adapter_change_nothing(trained: tuple[str, Trained], deployments: tuple[Path, Path]) -> None:
    kind, made = trained
    digest, out = made.record["adapter_digest"], deployments[kind == "text"]
    assert read_adapter(made.folder).digest == digest
    assert export_adapter(made.folder, out, name=kind).tasks[kind].adapter_digest == digest
    weights = made.folder / "adapter_model.safetensors"
    head = set() if kind == "text" else {"head.onnx"}
    exported = {path.name for path in (out / "tasks" / kind).iterdir()}
    assert exported == {"adapter.onnx", "adapter_config.json", weights.name} | head
    for name in (PAGE_FILE, "README.md"):
        (made.folder / name).unlink()
    assert read_adapter(made.folder).digest == digest
    planted = bytearray(weights.read_bytes())
    planted[-4] ^= 1
    weights.write_bytes(planted)
    assert read_adapter(made.folder).digest != digest
