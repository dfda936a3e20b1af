"""`--rows`, `--map`, `--template` and standard input of `run`, `embed` and `classify`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.tiny_deployments import make_deployment

from adalink.tools.cli import main

BODIES = ["ab, c", "two\nlines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory.mktemp("rows"), "gpt2", {"alpha": {"seed": 1}})[1]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "body", "text", "which"], *([n, body, "x", "alpha"] for n, body in enumerate(BODIES))])
    return tmp_path / "rows.csv"


def run(folder: Path, *arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(main, ["run", str(folder), "--max-new-tokens", "2", *map(str, arguments)], **options)


def entries(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_columns_are_carried_through(folder: Path, rows: Path) -> None:
    got = entries(run(folder, "--rows", rows, "--map", "task=which,prompt=body"))
    assert [entry["id"] for entry in got] == ["0", "1"]
    assert [entry["prompt"] for entry in got] == BODIES
    assert [entry["task"] for entry in got] == ["alpha"] * 2
    assert [entry["row_text"] for entry in got] == ["x"] * 2
    single = [entries(run(folder, body, "--task", "alpha", "--json"))[0] for body in BODIES]
    assert [entry["text"] for entry in got] == [entry["text"] for entry in single]


def test_templates_make_prompts(folder: Path, rows: Path) -> None:
    got = entries(run(folder, "--rows", rows, "--template", "{body}:", "--map", "task=which"))
    assert [entry["prompt"] for entry in got] == [f"{body}:" for body in BODIES]


def test_standard_input_has_lines(folder: Path) -> None:
    lines = "".join(json.dumps({"prompt": body, "n": 1}) + "\n" for body in BODIES)
    got = entries(run(folder, "--jsonl", "-", input=lines))
    assert [(entry["prompt"], entry["n"]) for entry in got] == [(body, 1) for body in BODIES]
    result = run(folder, "--rows", "-", input='{"prompt": "a"}\n{"promt": "b"}\n')
    assert result.exit_code == 2
    assert "standard input:2: " in result.stderr


def test_bad_rows_of_csv_can_be_skipped(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,id\na,1\nb\nc,3\n")
    result = run(folder, "--rows", tmp_path / "rows.csv", "--on-error", "skip")
    got = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 2
    assert (got[0]["id"], got[2]["id"]) == ("1", "3")
    assert got[1]["line"] == 3
    assert "rows.csv:3: 1 cells, expected 2" in got[1]["error"]


def test_rows_may_be_conversations(folder: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "id": 4}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    result = run(folder, "--rows", tmp_path / "rows.jsonl")
    if result.exit_code:  # a base without a template says so, by line
        assert "rows.jsonl:1: " in result.stderr
    else:
        assert entries(result)[0]["id"] == 4


@pytest.mark.parametrize("arguments", [("--map", "prompt=a"), ("--template", "{a}")])
def test_options_of_rows_need_rows(folder: Path, arguments: tuple[str, str]) -> None:
    result = run(folder, "x", *arguments)
    assert result.exit_code == 2
    assert f"{arguments[0]} is for the rows of --rows" in result.stderr


def test_missing_columns_are_named(folder: Path, rows: Path) -> None:
    result = run(folder, "--rows", rows)
    assert result.exit_code == 2
    assert "rows.csv:2: expected" in result.stderr
    assert "there is no column 'prompt'; there are id, body, text, which" in result.stderr
    assert "--map prompt=COLUMN" in result.stderr
