"""`adalink embed` against `Deployment.encode`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.runtime import random_adapter, write_adapter
from helpers.sentences import TEXTS, save_encoder, save_sentence_encoder

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.tools.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embed")
    model = save_sentence_encoder(
        root / "tiny",
        save_encoder(root / "plain"),
        {"pooling_mode": "cls"},
        prompts={"query": "query: "},
        max_seq_length=24,
    )
    base = export_base(model, root / "out").base
    settings = {"rank": 3, "activation": "gelu", "bias": True, "scope": "all"}
    adapter = random_adapter(base.fingerprint, base.hidden_size, 5, **settings)
    export_adapter(write_adapter(root / "topics", adapter), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Deployment]:
    with Deployment.open(folder) as deployment:
        yield deployment


def embed(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["embed", *map(str, arguments)])


def test_a_text_gives_its_numbers(folder: Path, opened: Deployment) -> None:
    plain = embed(folder, "oil prices", "--task", "topics")
    assert np.array_equal(np.array(plain.stdout.split(), np.float32), opened.encode(["oil prices"], "topics")[0])
    entry = json.loads(embed(folder, "oil prices", "--json", "--prompt-name", "query").stdout)
    assert np.array_equal(np.float32(entry["embedding"]), opened.encode(["oil prices"], prompt="query: ")[0])
    assert (entry["text"], entry["task"], entry["truncated"]) == ("oil prices", None, False)


def test_rows_of_a_file(folder: Path, opened: Deployment, tmp_path: Path) -> None:
    rows = [
        {"text": text, "task": task} for text, task in zip(TEXTS, [None, "topics", None, "topics"] * 2, strict=False)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = embed(folder, "--jsonl", tmp_path / "rows.jsonl", "--pooling", "mean", "--pooling", "max", "--normalize")
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    wanted = opened.encode(TEXTS, [row["task"] for row in rows], pooling=["mean", "max"], normalize=True)
    assert np.array_equal(np.float32([entry["embedding"] for entry in entries]), wanted)
    assert [entry["text"] for entry in entries] == TEXTS
    assert "2 of 5 texts were longer than 24 tokens, and were cut" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either TEXT or --rows"),
        (("a", "--jsonl", "rows.jsonl"), "either TEXT or --rows"),
        (("a", "--prompt-name", "passage"), "its prompts are: document, query"),
        (("a", "--task", "nobody"), "not deployed"),
    ],
)
def test_wrong_use(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = embed(folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a"}', "expected"),
        ('{"text": "a", "tasks": "topics"}', "did you mean 'task'"),
        ('{"text": "a", "task": 3}', "task is 3"),
        ('{"text": "a", "text_pair": "b"}', "a pair of texts has no embedding"),
        ('{"text": "\\ud800"}', "half of a character"),
    ],
)
def test_wrong_rows(folder: Path, tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row)
    result = embed(folder, "--jsonl", tmp_path / "rows.jsonl")
    assert result.exit_code == 2
    assert f"rows.jsonl:1: {message}" in result.stderr or message in result.stderr
