"""`adalink classify` against `Deployment.classify`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.heads import make_head_deployment

from adalink.runtime import Deployment
from adalink.tools.cli import main

TEXT = "the price of corn fell"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_head_deployment(tmp_path_factory.mktemp("heads"))[1]


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Deployment]:
    with Deployment.open(folder) as deployment:
        yield deployment


def classify(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["classify", *map(str, arguments)])


def test_each_kind_is_shown(folder: Path, opened: Deployment) -> None:
    topics, colours, rating, names = opened.classify([TEXT] * 4, ["topics", "colours", "rating", "names"])
    shown = classify(folder, TEXT, "--task", "topics").stdout.splitlines()
    ranked = sorted(topics.probabilities.items(), key=lambda pair: -pair[1])
    assert shown == [f"{share:.3f} {label}" for label, share in ranked]
    shown = classify(folder, TEXT, "--task", "colours").stdout.splitlines()
    assert {line.split()[1] for line in shown} == set(colours.labels)
    assert classify(folder, TEXT, "--task", "rating").stdout == f"{rating.value:.6g}\n"
    shown = classify(folder, TEXT, "--task", "names").stdout.splitlines()
    assert shown == [f"{one.start}-{one.end} {one.label} {one.probability:.3f}: {one.text}" for one in names.spans]
    assert names.spans


def test_pairs_and_rows_of_mixed_tasks(folder: Path, opened: Deployment, tmp_path: Path) -> None:
    pair = json.loads(classify(folder, "oil", "--text-pair", "corn", "--task", "topics", "--json").stdout)
    (wanted,) = opened.classify([("oil", "corn")], "topics")
    assert pair == {"text": "oil", "task": "topics", **wanted.as_record()}
    rows = [{"text": TEXT, "task": "names"}, {"text": TEXT, "task": "colours"}, {"text": "oil", "text_pair": "corn"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = classify(folder, "--jsonl", tmp_path / "rows.jsonl", "--task", "rating")
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["task"] for entry in entries] == ["names", "colours", "rating"]
    assert ["spans" in entries[0], "labels" in entries[1], "value" in entries[2]] == [True] * 3
    assert "1 of 3 texts were longer" in result.stderr


def test_the_line_at_fault_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "oil"}\n\n{"text": "oil", "task": "plain"}\n{"text": "oil", "task": "topics"}\n')
    result = classify(folder, "--jsonl", path, "--task", "topics")
    assert result.exit_code == 2
    assert "rows.jsonl:3: task 'plain' has no labels" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either TEXT or --rows"),
        (("a",), "name a task with --task; deployed are: "),
        (("a", "--task", "plain"), "task 'plain' has no labels"),
        (("a", "--task", "nobody"), "not deployed"),
        (("a", "--task", "names", "--text-pair", "b"), "is a pair"),
        (("--jsonl", "missing.jsonl", "--text-pair", "b"), "--text-pair is for one text"),
        (("--jsonl", "missing.jsonl"), "cannot be read"),
    ],
)
def test_wrong_use(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = classify(folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
