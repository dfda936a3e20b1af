"""`adalink eval` against `Deployment.classify`, `generate` and counting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.heads import make_head_deployment
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from sklearn.metrics import accuracy_score, f1_score

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.storage.label_spec import LabelSet
from adalink.tools.cli import main
from adalink.tools.evaluation.report import Report, TaskReport

LABELS = (" oil", " wheat", " tea")
NAMES = ["oil", "wheat", "tea"]
TEXTS = [f"text {number} of oil" for number in range(12)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoder")
    base = export_base(FAMILIES["llama"](), root / "out", tokenizer=make_tokenizer()).base
    for seed, (name, labels) in enumerate({"topics": LabelSet(completions=LABELS), "free": None}.items()):
        settings: dict[str, Any] = {"rank": 3, "activation": "gelu", "bias": False, "scope": "all", "labels": labels}
        adapter = random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
        export_adapter(write_adapter(root / name, adapter), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_head_deployment(tmp_path_factory.mktemp("encoder"))[1]


def evaluate(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_report(folder: Path) -> Report:
    return msgspec.json.decode((folder / "report.json").read_bytes(), type=Report)


def test_labels_on_a_decoder(decoder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": LABELS[place % 3], "id": place} for place, text in enumerate(TEXTS)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    files = ("--json-file", tmp_path / "report.json", "--html", tmp_path / "report.html")
    result = evaluate(decoder, "--data", data, "--task", "topics", "--against", "base", *files)
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path)
    with Deployment.open(decoder) as deployment:
        said = [one.label for one in deployment.classify(TEXTS, "topics")]
        base = [one.label for one in deployment.classify(TEXTS, labels=LABELS)]
    expected = [NAMES[place % 3] for place in range(12)]
    (task,) = report.tasks
    assert task.labels is not None
    assert task.reference is not None
    assert task.accuracy is not None
    assert task.accuracy.value == pytest.approx(accuracy_score(expected, said))
    assert task.labels.macro_f1.value == pytest.approx(f1_score(expected, said, average="macro"))
    assert task.reference.value == pytest.approx(accuracy_score(expected, base))
    assert [row.line for row in sorted(task.wrong, key=lambda row: row.line)] == [
        place + 1 for place in range(12) if said[place] != expected[place]
    ]
    chances = [row.probability for row in task.wrong]
    assert chances == sorted(chances, key=lambda chance: -(chance or 0))
    lines = result.stdout.splitlines()
    assert lines[0] == report.verdict
    assert lines[0].startswith(f"topics (onnxruntime-cpu) is right on {100 * task.accuracy.value:.1f} % of 12 rows")
    assert max(map(len, lines[1:])) <= max(80, len(report.verdict))
    assert report.verdict.split(" (")[0] in (tmp_path / "report.html").read_text()


def test_text_is_right_only_as_a_whole(decoder: Path, tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, base_defaults=False)
    with Deployment.open(decoder) as deployment:
        made = deployment.generate(TEXTS, tasks="free", max_new_tokens=12, sampling=greedy, stop=[])
    rows = [{"prompt": text, "completion": f"{one.text} more"} for text, one in zip(TEXTS, made, strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    result = evaluate(decoder, "--data", data, "--task", "free", "--json-file", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    (task,) = read_report(tmp_path).tasks
    assert task.accuracy is not None
    assert (task.kind, task.labels, task.reference, task.accuracy.value) == ("text", None, None, 0.0)
    assert len(task.wrong) == 12


def test_heads_beside_each_other(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": ("oil", "grain", "trade")[place % 3]} for place, text in enumerate(TEXTS)]
    rows.append({"text": "a very long text with more words " * 5, "text_pair": "oil", "label": "oil"})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    tasks = ("--task", "topics", "--task", "frozen")
    result = evaluate(encoder, "--data", data, *tasks, "--json-file", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = read_report(tmp_path)
    assert [one.task for one in report.tasks] == ["topics", "frozen"]
    texts: list[Any] = [*TEXTS, (rows[-1]["text"], "oil")]
    with Deployment.open(encoder) as deployment:
        for task in report.tasks:
            said = [one.label for one in deployment.classify(texts, task.task)]
            assert task.accuracy is not None
            assert task.accuracy.value == pytest.approx(accuracy_score([row["label"] for row in rows], said))
            assert task.reference is not None
            assert (task.reference.name, task.reference.value) == ("always 'oil'", pytest.approx(5 / 13))
            assert task.cut == 1
    assert result.stdout.startswith("2 evaluated. The best: ")


def test_a_row_may_be_for_one_task(encoder: Path, tmp_path: Path) -> None:
    """Rows of other tasks, which would be wrong here, play no part."""
    with Deployment.open(encoder) as deployment:
        said = {task: [one.label for one in deployment.classify(TEXTS, task)] for task in ("topics", "frozen")}
    assert said["topics"] != said["frozen"]
    rows = [
        {"text": text, "label": label, "task": task}
        for task, labels in said.items()
        for text, label in zip(TEXTS, labels, strict=True)
    ]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "a", "label": "oil"}])
    tasks = ("--task", "topics", "--task", "frozen")
    result = evaluate(encoder, "--data", data, *tasks, "--json-file", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    for task in read_report(tmp_path).tasks:
        assert task.rows == 13
        assert {row.line for row in task.wrong} <= {25}
    data = write_rows(tmp_path / "rows.jsonl", rows[:12])
    result = evaluate(encoder, "--data", data, "--task", "frozen")
    assert (result.exit_code, "every row names another task than 'frozen'" in result.stderr) == (2, True)


def test_several_labels(encoder: Path, tmp_path: Path) -> None:
    names = ("red", "green", "blue", "black", "white")
    rng = np.random.default_rng(3)
    rows = [{"text": text, "labels": [name for name in names if rng.random() < 0.4]} for text in TEXTS]
    task = evaluate_one(encoder, tmp_path, "colours", rows)
    with Deployment.open(encoder) as deployment:
        said = deployment.classify(TEXTS, "colours")
    expected, given = (
        np.array([[name in labels for name in names] for labels in side])
        for side in ([row["labels"] for row in rows], [one.labels for one in said])
    )
    assert task.items is not None
    assert task.accuracy is not None
    assert task.accuracy.value == pytest.approx(accuracy_score(expected, given))
    assert task.items.f1.value == pytest.approx(f1_score(expected, given, average="micro"))
    for one in task.items.classes:
        place = names.index(one.label)
        assert one.f1 == pytest.approx(f1_score(expected[:, place], given[:, place], zero_division=0.0))
    assert task.reference is not None
    commonest = max((expected == row).all(axis=1).mean() for row in expected)
    assert task.reference.value == pytest.approx(commonest)


def test_numbers(encoder: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(4).normal(size=len(TEXTS)).round(3).tolist()
    rows = [{"text": text, "label": float(value)} for text, value in zip(TEXTS, values, strict=True)]
    task = evaluate_one(encoder, tmp_path, "rating", rows)
    with Deployment.open(encoder) as deployment:
        said = np.array([one.value for one in deployment.classify(TEXTS, "rating")])
    assert task.numbers is not None
    assert task.reference is not None
    assert (task.accuracy, task.labels, task.items) == (None, None, None)
    assert task.numbers.mean_absolute_error.value == pytest.approx(np.mean(np.abs(said - values)))
    assert task.reference.value == pytest.approx(np.mean(np.abs(np.median(values) - values)))
    errors = [abs(row.error or 0) for row in task.wrong]
    assert errors == pytest.approx(sorted(np.abs(said - values), reverse=True))
    assert task.verdict.startswith("rating (onnxruntime-cpu) is off by ")


def test_spans(encoder: Path, tmp_path: Path) -> None:
    """Rows that say what the task says, but for one end, one label and one span that is too much."""
    with Deployment.open(encoder) as deployment:
        said = deployment.classify(TEXTS, "names")
    rows = [
        {"text": text, "spans": [{"start": span.start, "end": span.end, "label": span.label} for span in one.spans]}
        for text, one in zip(TEXTS, said, strict=True)
    ]
    found = sum(len(row["spans"]) for row in rows)
    rich = [row for row in rows if row["spans"]]
    assert len(rich) > 2
    rich[0]["spans"][-1]["end"] -= 1
    rich[1]["spans"][0]["label"] = "PER" if rich[1]["spans"][0]["label"] == "LOC" else "LOC"
    del rich[2]["spans"][0]
    task = evaluate_one(encoder, tmp_path, "names", rows)
    assert task.items is not None
    assert (task.items.right, task.items.expected, task.items.given) == (found - 3, found - 1, found)
    assert task.items.f1.value == pytest.approx(2 * (found - 3) / (2 * found - 1))
    assert len(task.wrong) == 3
    assert task.reference is None


def evaluate_one(folder: Path, root: Path, task: str, rows: list[dict[str, Any]]) -> TaskReport:
    files = ("--json-file", root / "report.json", "--html", root / "report.html")
    result = evaluate(folder, "--data", write_rows(root / "rows.jsonl", rows), "--task", task, *files)
    assert result.exit_code == 0, result.output
    report = read_report(root)
    assert result.stdout.splitlines()[0] == report.verdict
    assert max(map(len, result.stdout.splitlines())) <= max(80, len(report.verdict))
    return report.tasks[0]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a", "completion": " tin"}, ("--task", "topics"), "rows.jsonl:1: label 'tin' is none of task"),
        ({"prompt": "a"}, ("--task", "topics"), "fields are prompt, expected"),
        ({"prompt": "a", "completion": " "}, ("--task", "topics"), "completion is ' ', expected a text"),
        ({"text": "a", "labels": ["b"]}, ("--task", "topics"), "'labels' is for a task of multi_label"),
        ({"text": "a", "label": 0.5}, ("--task", "topics"), "label is 0.5, expected a text"),
        ({"text": "a", "label": "oil"}, ("--task", "topcis"), "did you mean 'topics'?"),
        ({"text": "a", "label": "oil"}, ("--task", "free", "--against", "majority"), "are for labels"),
        ({"text": "a", "label": "oil"}, ("--variant", "int3"), "int3"),
    ],
)
def test_wrong_rows_and_options(
    decoder: Path, tmp_path: Path, row: dict[str, Any], options: tuple[str, ...], message: str
) -> None:
    result = evaluate(decoder, "--data", write_rows(tmp_path / "rows.jsonl", [row]), *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("colours", (), "columns are label, text, expected text and labels as for multi_label_classification"),
        ("rating", (), "label is 'oil', expected a number"),
        ("names", (), "expected text and spans or tokens and tags as for token_classification"),
        ("plain", (), "has no head"),
        ("topics", ("--against", "base"), "the base has no head"),
    ],
)
def test_tasks_that_are_not_evaluated(
    encoder: Path, tmp_path: Path, task: str, options: tuple[str, ...], message: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "oil"}])
    result = evaluate(encoder, "--data", data, "--task", task, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_without_scikit_learn(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = evaluate(decoder, "--data", tmp_path / "none.jsonl", "--task", "topics")
    assert result.exit_code == 2
    assert "pip install 'adalink-kit[eval]'" in result.stderr
