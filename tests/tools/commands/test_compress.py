"""`adalink compress` on a real deployment: what is written, what is refused, and what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.heads import make_head_deployment
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.label_spec import LabelSet
from adalink.tools.cli import main
from adalink.tools.evaluation.loss import Loss

LABELS = (" oil", " wheat", " tea")
TEXTS = [f"text {number} of oil and {'wheat' * (number % 3)}" for number in range(16)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment, two adapters of its base, and rows whose right answers are what the adapters say."""
    root = tmp_path_factory.mktemp("compress")
    base = export_base(FAMILIES["llama"](), root / "deployment", tokenizer=make_tokenizer()).base
    common = {"rank": 16, "activation": "identity", "bias": False, "scope": "all"}
    for seed, (name, labels) in enumerate({"topics": LabelSet(completions=LABELS), "free": None}.items()):
        adapter = random_adapter(base.fingerprint, base.hidden_size, seed, **common, labels=labels)
        write_adapter(root / name, adapter)
    with Deployment.open(root / "deployment", threads=1) as deployment:
        deployment.add_task(root / "topics")
        said = [one.label for one in deployment.classify(TEXTS, tasks="topics")]
        deployment.add_task(root / "free")
        greedy = SamplingParams(temperature=0)
        free = [
            one.text for one in deployment.generate(TEXTS, tasks="free", max_new_tokens=3, sampling=greedy, stop=[])
        ]
    write_rows(root / "topics.jsonl", [{"text": text, "label": label} for text, label in zip(TEXTS, said, strict=True)])
    rows = [{"prompt": text, "completion": one} for text, one in zip(TEXTS, free, strict=True)]
    write_rows(root / "free.jsonl", rows)
    return root


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compress(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["compress", *map(str, arguments)])


def arguments(root: Path, name: str, out: Path, *more: Any) -> list[Any]:
    rows = ("--rows", root / f"{name}.jsonl", "--threads", 1)
    return [root / name, "--deployment", root / "deployment", "--out", out, *rows, *more]


def test_an_adapter_becomes_smaller_and_answers_the_same(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = compress(*arguments(root, "topics", out, "--json"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["written"]
    assert (report["rows"], report["measure"], report["weight_dtype"]) == (16, "accuracy", "int8")
    assert report["size_bytes"] == (out / "adapter_model.safetensors").stat().st_size < report["size_bytes_before"] / 2
    small = read_adapter(out)
    assert small.config.nested
    with Deployment.open(root / "deployment", threads=1) as deployment:
        deployment.add_task(root / "topics")
        deployment.add_task(out, "small")
        before, after = ([one.label for one in deployment.classify(TEXTS, tasks=name)] for name in ("topics", "small"))
    assert report["same"] == sum(one == other for one, other in zip(before, after, strict=True))
    assert report["before"] == 1.0  # the rows are what it says
    assert report["after"] == report["same"] / 16
    assert not list((root / "deployment" / "tasks").glob("*"))


def test_a_loss_that_is_too_large_writes_nothing(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    compress(*arguments(root, "topics", out, "--most-loss", 100))
    kept = read_adapter(out).digest
    lossy = arguments(root, "topics", out, "--rank", 1, "--bits", 4, "--replace", "--most-loss", 0)
    result = compress(*lossy, "--json")
    report = json.loads(result.stdout)
    assert report["after"] < 1.0, "rank 1 says all the same: other rows are needed here"
    assert result.exit_code == 1
    assert not report["written"]
    assert "nothing was written" in result.stderr
    assert read_adapter(out).digest == kept
    assert list(tmp_path.iterdir()) == [out]
    allowed = compress(*lossy[:-2], "--most-loss", 100, "--json")
    assert allowed.exit_code == 0
    assert json.loads(allowed.stdout)["loss_points"] == pytest.approx(report["loss_points"])
    assert read_adapter(out).config.rank == 1


def test_half_a_point_is_no_more_than_half_a_point() -> None:
    wrong = [
        Loss(measure="accuracy", rows=200, same=0, before=right / 200, after=(right - 1) / 200).points
        for right in range(1, 201)
    ]
    assert wrong == [0.5] * 200


def test_text_is_compared_and_tokens_of_the_training_weigh(root: Path, tmp_path: Path) -> None:
    plain = compress(*arguments(root, "free", tmp_path / "plain", "--rank", 6, "--most-loss", 100, "--json"))
    weighed = compress(
        *arguments(root, "free", tmp_path / "weighed", "--rank", 6, "--most-loss", 100, "--json"),
        *("--weigh-by", root / "free.jsonl"),
    )
    for result in (plain, weighed):
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert (report["rank"], report["rank_before"]) == (6, 16)
    one, other = (read_adapter(tmp_path / name) for name in ("plain", "weighed"))
    assert not np.array_equal(one.weights["text.down.weight"], other.weights["text.down.weight"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_head_deployment(tmp_path_factory.mktemp("encoder"))[1].parent


@pytest.mark.parametrize(
    ("name", "measure"), [("topics", "accuracy"), ("colours", "F1"), ("rating", "R2"), ("names", "F1")]
)
def test_tasks_with_heads_keep_them(encoder: Path, tmp_path: Path, name: str, measure: str) -> None:
    texts = [f"oil {'prices rose' * (number % 4)} and wheat of {number}" for number in range(12)]
    with Deployment.open(encoder / "out", threads=1) as deployment:
        said = deployment.classify(texts, tasks=name)
    answers = {
        "topics": [{"label": one.label} for one in said],
        "colours": [{"labels": sorted(one.labels)} for one in said],
        "rating": [{"label": one.value} for one in said],
        "names": [
            {"spans": [{"start": span.start, "end": span.end, "label": span.label} for span in one.spans]}
            for one in said
        ],
    }[name]
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": text, **answer} for text, answer in zip(texts, answers, strict=True)]
    )
    command = [encoder / name, "--deployment", encoder / "out", "--rows", rows, "--out", tmp_path / "small"]
    result = compress(*command, "--most-loss", 100, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["measure"], report["before"], report["energy"]) == (measure, pytest.approx(1.0), None)
    assert report["after"] <= 1.0
    whole, small = read_adapter(encoder / name), read_adapter(tmp_path / "small")
    assert small.config.head == whole.config.head
    np.testing.assert_array_equal(small.weights["head.weight"], whole.weights["head.weight"])
    assert not np.array_equal(small.weights["text.up.weight"], whole.weights["text.up.weight"])
    ranked = compress(*command, "--rank", 1, "--replace")
    assert ranked.exit_code == 2
    assert "cannot be put in another order" in ranked.stderr


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--rank", 4, "--energy", 0.5], 2, "give one of --rank and --energy"),
        (["--rank", 0], 2, "is not in the range"),
        (["--energy", 0], 2, "is not in the range"),
        (["--bits", 16], 2, "is not one of"),
        (["--rows", "nothing.jsonl"], 2, "nothing.jsonl"),
    ],
)
def test_wrong_use_is_said_before_anything_is_computed(
    root: Path, tmp_path: Path, more: list[Any], code: int, message: str
) -> None:
    result = compress(*arguments(root, "topics", tmp_path / "small"), *more)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "small").exists()


def test_the_adapter_itself_and_other_folders_are_not_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    inner = shutil.copytree(root / "topics", shutil.copytree(root / "free", tmp_path / "outer") / "topics")
    outer = compress(inner, *arguments(root, "topics", tmp_path / "outer")[1:], "--replace")
    assert outer.exit_code == 2
    assert "holds the adapter" in outer.stderr
    for out, message in (
        (root / "topics", "is the adapter"),
        (tmp_path / "other", "it is no adapter"),
        (root / "free", "pass --replace"),
    ):
        result = compress(*arguments(root, "topics", out))
        assert result.exit_code == 2
        assert message in result.stderr
    assert (tmp_path / "other" / "file").read_text() == "mine"
