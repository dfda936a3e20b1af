"""Rows of every form of file, against files that csv, json and pyarrow write, and odd files."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adalink.runtime.errors import BackendUnavailableError, ConfigError, DataError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.runtime.rows.table import read_table

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)
ROWS = [
    {"text": 'oil, "crude"', "label": "oil", "id": "1"},
    {"text": "two\nlines\tand é\u2028", "label": "", "id": "2"},
    {"text": " spaces ", "label": "x", "id": "3"},
]


def read(source: Any, skip: Any = None) -> list[tuple[int, dict[str, Any]]]:
    return [(row.line, row.fields) for row in read_table(source, '{"text": "..."}', skip)]


def values(source: Any) -> list[dict[str, Any]]:
    return [fields for _, fields in read(source)]


def write_csv(path: Path, rows: list[dict[str, str]], **options: Any) -> Path:
    with path.open("w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rows.csv", {}),
        ("rows.CSV", {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}),
        ("rows.csv", {"encoding": "utf-8-sig"}),
        ("rows.csv", {"delimiter": ";"}),
        ("rows.csv", {"delimiter": ";", "quoting": csv.QUOTE_ALL}),
        ("rows.csv", {"delimiter": "\t"}),
        ("rows.tsv", {"dialect": "excel-tab"}),
        ("rows.tab", {"delimiter": "\t", "lineterminator": "\n"}),
    ],
)
def test_csv_as_the_standard_library_writes_it(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    assert values(write_csv(tmp_path / name, ROWS, **options)) == ROWS


@settings(max_examples=60)
@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6), st.sampled_from(["csv", "tsv"]))
def test_any_cells_come_back(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]], form: str) -> None:
    rows = [{"a": first, "b": second} for first, second in cells]
    dialect = "excel" if form == "csv" else "excel-tab"
    path = write_csv(tmp_path_factory.mktemp("cells") / f"rows.{form}", rows, dialect=dialect)
    assert values(path) == rows


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\r\ntext,label\r\n"a\r\nb",x\r\n\r\nc,y\r\n"d\n\ne",z\nf,w')
    assert read(path) == [
        (3, {"text": "a\r\nb", "label": "x"}),
        (6, {"text": "c", "label": "y"}),
        (7, {"text": "d\n\ne", "label": "z"}),
        (10, {"text": "f", "label": "w"}),
    ]


def test_excel_says_its_separator(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sep=|\r\ntext|label\r\na,b|c\r\n")
    assert read(tmp_path / "rows.csv") == [(3, {"text": "a,b", "label": "c"})]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_lists_and_lines(tmp_path: Path, indent: int | None, encoding: str) -> None:
    rows = [{"text": "é\u2028", "n": [1, {"a": None}]}, {"text": "", "n": 2.5}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding=encoding)
    assert read(tmp_path / "rows.json") == [(1, rows[0]), (2, rows[1])]
    for name in ("lines.json", "lines.jsonl", "lines.ndjson", "lines"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding=encoding)
        assert values(tmp_path / name) == rows


def test_parquet_as_pyarrow_writes_it(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"text": f"é {number}", "labels": ["a"] * (number % 3), "n": number / 2, "on": datetime.date(2026, 1, 2)}
        for number in range(3000)
    ]
    rows[1]["labels"] = None
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    expected = [
        {name: value for name, value in row.items() if value is not None} | {"on": "2026-01-02"} for row in rows
    ]
    assert read(tmp_path / "rows.parquet") == list(enumerate(expected, start=1))


def test_class_labels_of_datasets_have_their_names(tmp_path: Path) -> None:
    """As `datasets` writes them: numbers, and names in the metadata."""
    import pyarrow
    from pyarrow import parquet

    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["grain", "oil"], "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 0]}).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == [{"text": "a", "label": "oil"}, {"text": "b", "label": "grain"}]
    table = pyarrow.table({"text": ["a"], "label": [2]}).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: row 1: label is 2, expected one of the file's 2 classes"):
        read(tmp_path / "rows.parquet")


def test_parquet_needs_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BackendUnavailableError, match=r"rows\.parquet: Parquet needs pyarrow, .*pip install pyarrow"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", r"a\.csv is empty, expected a header line"),
        ("a.csv", b"\xef\xbb\xbf\n \n", r"a\.csv is empty, expected a header line"),
        ("a.csv", b"text,label\n", r"a\.csv holds no rows"),
        ("a.json", b"", r"a\.json holds no rows"),
        ("a.json", b"[]", r"a\.json holds no rows"),
        ("a.json", b'[{"text": 1}, 3]', r"a\.json: row 2: expected \{.*, received 3"),
        ("a.json", b'[{"text": 1}', r"a\.json: not JSON: .*expected a list of rows"),
        ("a.json", b'["\xff"]', r"a\.json: byte 2 is not UTF-8"),
        ("a.json", b'{\n"text": 1}', r"a\.json:1: not JSON"),
        ("a.csv", b"text,label\na,b\na,b,c\n", r"a\.csv:3: 3 cells, expected 2 as in the header \(text, label\)"),
        ("a.csv", b"text,label\na\n", r"a\.csv:2: 1 cells, expected 2"),
        (
            "a.csv",
            b'text,label\na,b\n"c,d\ne,f\n',
            r"a\.csv:3: not CSV: unexpected end of data; is a quote never",
        ),
        ("a.csv", b'text,label\n"a"b,c\n', r"a\.csv:2: not CSV: .*doubled\?"),
        ("a.csv", b"text,label\ra,b\r", r"a\.csv:1: not CSV: new-line character"),
        ("a.csv", b"text,label\na,b\0\n", r"a\.csv:2: it holds a NUL"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), r"a\.csv: byte 0 is not UTF-8: .*looks like UTF-16"),
        ("a.csv", "text,label\na,b\ncafé,b".encode("latin-1"), r"a\.csv: byte 18 is not UTF-8: .*\(line 3\)"),
        ("a.csv", b"text,label,text\na,b,c\n", r"a\.csv:1: column 'text' is 2 times in the header"),
        ("a.csv", b"text,images\na,b\n", r"""a\.csv:2: column 'images' is 'b', expected JSON, such as \["a", "b"\]"""),
        ("a.parquet", b"PAR1", r"a\.parquet: cannot be read: .*expected a Parquet file"),
        ("a.jsonl", b'{"text": "a\0"}', r"a\.jsonl:1: not JSON"),
        (
            "a.jsonl",
            rb'{"text": "\ud83d\ude00 \ude00"}',
            r"a\.jsonl:1: not JSON: it holds \\ude00, half of a",
        ),
    ],
)
def test_odd_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet", "a.jsonl"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read: (.* )?No such file or directory.*; expected a"):
        read(tmp_path / name)


def test_long_cells_leave_the_limit_of_others(tmp_path: Path) -> None:
    """Ten million characters; the process's own limit of `csv` is as before, in the middle of reading too."""
    before, long = csv.field_size_limit(), "x" * 10_000_000
    rows = read_table(write_csv(tmp_path / "rows.csv", [{"text": long, "label": "a"}] * 2), "x")
    assert next(rows).fields["text"] == long
    assert csv.field_size_limit() == before
    assert [row.fields["label"] for row in rows] == ["a"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": long}))
    assert values(tmp_path / "rows.jsonl") == [{"text": long}]


def test_two_files_at_once(tmp_path: Path) -> None:
    """The limit is right while threads read long cells beside each other."""
    path = write_csv(tmp_path / "rows.csv", [{"text": "x" * 200_000, "label": "a"}] * 20)
    before, counts = csv.field_size_limit(), []
    threads = [threading.Thread(target=lambda: counts.append(len(read(path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counts, csv.field_size_limit()) == ([20] * 4, before)


def test_lists_in_cells_and_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,labels,task,note,\na,"[""x"", ""y""]",,,7\nb,[],t,n,8\n')
    assert values(path) == [
        {"text": "a", "labels": ["x", "y"], "note": "", "column 5": "7"},
        {"text": "b", "labels": [], "task": "t", "note": "n", "column 5": "8"},
    ]


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    for name, data in (("a.csv", "text,b\n1,2\n3\n4,5\n"), ("a.json", '[{"text": 1},\n2,\n{"text": 4}]')):
        (tmp_path / name).write_text(data)
        errors: list[int] = []
        rows = read(tmp_path / name, lambda line, _, errors=errors: errors.append(line))
        assert [str(fields["text"]) for _, fields in rows] == ["1", "4"]
        assert errors == [3 if name == "a.csv" else 2]


def test_columns_get_the_names_of_the_kit(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [{"body": "a", "label": "3", "label_text": "oil", "id": "7"}])
    source = RowSource(path, read_columns(("text=body,label=label_text",)))
    (row,) = read_table(source, "x")
    assert row.fields == {"text": "a", "label": "oil", "id": "7"}
    assert row.extras(("text", "label")) == {"id": "7", "label": "3"}
    with pytest.raises(DataError, match=r"rows\.csv:2: there is no column 'bdy', .* text; .*did you mean 'body'\?"):
        read(RowSource(path, {"text": "bdy"}))


@pytest.mark.parametrize(
    ("texts", "columns"),
    [
        (("text=a,label=b",), {"text": "a", "label": "b"}),
        (("text=a, b", "label=c=d"), {"text": "a, b", "label": "c=d"}),
    ],
)
def test_map_is_read(texts: tuple[str, ...], columns: dict[str, str]) -> None:
    assert read_columns(texts) == columns


@pytest.mark.parametrize("texts", [("text",), ("text=",), ("=a",), ("text=a", "text=b"), ("",)])
def test_wrong_maps(texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--map is"):
        read_columns(texts)


def test_unknown_names_and_templates() -> None:
    with pytest.raises(ConfigError, match=r"map names 'lable', .*did you mean 'label'\?"):
        RowSource(Path("x"), {"lable": "a"})
    for template in ("no column", "{", "{}", "{0.__class__!r}", "{text:>5}"):
        with pytest.raises(ConfigError, match=re.escape(f"template is {template!r}")):
            RowSource(Path("x"), template=template)


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [("Text: {body} Topic:", "Text: {a} Topic:", " oil"), ("{{{body}}}\n{n}\n", "{{a}}\n7\n", "oil")],
)
def test_templates(tmp_path: Path, template: str, prompt: str, completion: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "{a}", "topic": "oil", "n": 7}')
    (row,) = read_table(RowSource(tmp_path / "rows.jsonl", {"label": "topic"}, template), "x")
    assert (row.fields["prompt"], row.fields["completion"]) == (prompt, completion)


def test_templates_need_their_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the template names column 'texts'; .*mean 'text'\?"):
        read(RowSource(tmp_path / "rows.jsonl", template="{texts}"))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'text' is '', expected a text"):
        read(RowSource(tmp_path / "rows.jsonl", template="{text}"))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n{"text"')))
    rows = read_table("-", "x")
    assert next(rows).fields == {"text": "a"}
    with pytest.raises(DataError, match="standard input:2: not JSON"):
        next(rows)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        read("-")


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A file of 40 MB is read in a small part of its size."""
    import tracemalloc

    line = json.dumps({"text": "x" * 40_000}) + "\n"
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(line for _ in range(1000))
    tracemalloc.start()
    count = sum(1 for _ in read_table(tmp_path / "rows.jsonl", "x"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert peak < 2_000_000
