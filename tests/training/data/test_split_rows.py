"""Rows divided into two files: the same lot as the training's own, and files that mean what the rows mean."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adalink.runtime.errors import DataError, WriteError
from adalink.runtime.rows.source import RowSource
from adalink.tools.cli import main
from adalink.training.data.held_out import hold_out
from adalink.training.data.labelled_rows import read_labelled_rows
from adalink.training.data.rows import read_rows
from adalink.training.data.split_rows import split_rows


def write_csv(path: Path, names: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
    return path


def contents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def news(tmp_path: Path) -> Path:
    rows = [[f"text {number}", ("oil", "grain", "trade")[number % 3], number] for number in range(60)]
    return write_csv(tmp_path / "news.csv", ["body", "topic", "page"], [*rows, rows[0]])


def test_lot_is_that_of_a_training_without_eval_rows(news: Path, tmp_path: Path) -> None:
    source = RowSource(news, {"text": "body", "label": "topic"})
    files = split_rows(source, tmp_path / "rows", seed=7)
    _, rows = read_labelled_rows(source)
    split = hold_out([(row.text, None) for row in rows], [row.labels for row in rows], 7)
    for path, numbers in ((files.train, split.train), (files.test, split.held_out)):
        kind, written = read_labelled_rows(path)
        assert kind == "single_label_classification"
        expected = [rows[number] for number in numbers]
        assert [(row.text, row.labels) for row in written] == [(row.text, row.labels) for row in expected]
    assert Counter(row["label"] for row in contents(files.test)) == {"oil": 4, "grain": 4, "trade": 4}
    assert not {row["text"] for row in contents(files.test)} & {row["text"] for row in contents(files.train)}
    assert contents(files.test)[0].keys() == {"text", "label", "page"}
    assert split_rows(source, tmp_path / "again", seed=8).split != files.split


def test_prompts_are_made_by_the_template(news: Path, tmp_path: Path) -> None:
    source = RowSource(news, {"label": "topic"}, "Text: {body} Topic:")
    files = split_rows(source, tmp_path / "rows")
    rows = read_rows(source)
    for path, numbers in ((files.train, files.split.train), (files.test, files.split.held_out)):
        assert [row.content for row in read_rows(path)] == [rows[number].content for number in numbers]
    assert rows[1].content["prompt"] == "Text: text 1 Topic:"
    assert rows[1].completion == " grain"


@pytest.mark.parametrize(
    ("labels", "kind", "first"),
    [
        (["1.5", "2", "3.25"], "regression", 1.5),
        (["1", "2", "3"], "single_label_classification", "1"),
        (["1.5", "2", "x"], "single_label_classification", "1.5"),
    ],
)
def test_numbers_of_csv_keep_their_meaning(labels: list[str], kind: str, first: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "n.csv", ["text", "label"], [[f"t{n}", labels[n % 3]] for n in range(30)])
    files = split_rows(RowSource(path), tmp_path / "rows")
    rows = contents(files.train) + contents(files.test)
    assert {row["label"] for row in rows if row["text"] == "t0"} == {first}
    assert {read_labelled_rows(part)[0] for part in (files.train, files.test)} == {kind}


def test_images_are_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    rows = [{"prompt": f"<image> {n}", "completion": " a", "images": [f"{n}.png", "/srv/b.png"]} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = split_rows(RowSource(tmp_path / "rows.jsonl"), tmp_path / "rows")
    for row in contents(files.train) + contents(files.test):
        paths = [(tmp_path / "rows" / image).resolve() for image in row["images"]]
        assert paths == [tmp_path / f"{row['prompt'][-1]}.png", Path("/srv/b.png")]


def test_what_cannot_be_divided_leaves_old_files(news: Path, tmp_path: Path) -> None:
    source = RowSource(news, {"text": "body", "label": "topic"})
    files = split_rows(source, tmp_path / "rows")
    before = files.train.read_bytes(), files.test.read_bytes()
    one = write_csv(tmp_path / "one.csv", ["text", "label"], [["a", "x"], ["a", "y"]])
    with pytest.raises(DataError, match="all rows have one text"):
        split_rows(RowSource(one), tmp_path / "rows")
    with pytest.raises(DataError, match="read more than once"):
        split_rows(RowSource(Path("-")), tmp_path / "rows")
    assert (files.train.read_bytes(), files.test.read_bytes()) == before
    with pytest.raises(WriteError, match="choose a writable --out"):
        split_rows(source, news / "rows")


def test_split_says_how_many_rows_went_where(news: Path, tmp_path: Path) -> None:
    words = ["split", str(news), "--map", "text=body,label=topic", "--out", str(tmp_path / "rows")]
    plain, as_json = (CliRunner().invoke(main, [*words, *more]) for more in ([], ["--json"]))
    assert plain.exit_code == as_json.exit_code == 0
    assert "train.jsonl: 49 rows to learn from" in plain.stdout
    assert "test.jsonl: 12 rows to test with, by lot (seed 0, with every label's share)" in plain.stdout
    report = json.loads(as_json.stdout)
    assert (report["train_rows"], report["test_rows"], report["split"]["seed"]) == (49, 12, 0)
