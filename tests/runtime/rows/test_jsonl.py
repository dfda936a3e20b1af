"""Rows of JSON-lines files: every error names file, line, what is wrong and the repair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adalink.runtime.errors import DataError
from adalink.runtime.rows.jsonl import read_jsonl

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class Point(msgspec.Struct, forbid_unknown_fields=True):
    """A row of a known form."""

    x: int


DECODERS = [json.loads, msgspec.json.decode]


def read(path: Path, decode: Any = json.loads) -> list[tuple[int, Any]]:
    return list(read_jsonl(path, '{"x": number}', decode))


@given(
    rows=st.lists(st.tuples(VALUES, st.integers(0, 2)), min_size=1, max_size=8),
    ends=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    decode=st.sampled_from(DECODERS),
)
def test_rows_come_back_with_their_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, int]], ends: str, encoding: str, decode: Any
) -> None:
    lines: list[str] = []
    expected = []
    for value, blanks in rows:
        lines += [" "] * blanks + [json.dumps(value, ensure_ascii=False)]
        expected.append((len(lines), value))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(ends.join(lines), encoding=encoding, newline="")
    assert read(path, decode) == expected


@pytest.mark.parametrize("decode", [*DECODERS, msgspec.json.Decoder(Point).decode])
def test_truncated_line_is_named(tmp_path: Path, decode: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 1}\n\n{"x": 2}\n{"x": 3')
    rows = read_jsonl(path, '{"x": number}', decode)
    assert [next(rows)[0], next(rows)[0]] == [1, 3]
    with pytest.raises(DataError, match=r'rows\.jsonl:4: not JSON: .*; expected \{"x": number\}$'):
        next(rows)


@pytest.mark.parametrize("cut", range(1, 12))
def test_file_cut_anywhere_is_never_read_as_another(tmp_path: Path, cut: int) -> None:
    data = '{"x": 1}\n{"x": "é"}'.encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data[:-cut])
    if data[:-cut].endswith(b"}\n"):
        assert read(path) == [(1, {"x": 1})]
        return
    with pytest.raises(DataError, match=r"rows\.jsonl(:2: not JSON|: byte 16 is not UTF-8: save the file as UTF-8)"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"x": "1"}', r":1: Expected `int`, got `str` - at `\$\.x`; expected "),
        ('{"y": 1}', r":1: Object .*unknown field `y`; expected "),
        ('{"x": ' + "[" * 100_000, r":1: (not JSON: .*recursion.*|Expected `int`, got `array`.*); expected "),
    ],
)
def test_row_of_another_form_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"rows\.jsonl" + message):
        read(tmp_path / "rows.jsonl", msgspec.json.Decoder(Point).decode)


def test_nesting_beyond_reason_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not JSON"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("text", ["", "\n", "\ufeff\n \n\t\n"])
def test_file_without_rows_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r'rows\.jsonl holds no rows; expected lines \{"x": number\}'):
        read(tmp_path / "rows.jsonl")


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read: No such file or directory; expected a JSONL"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory; expected a JSONL file"):
        read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"x": "caf\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl: byte 10 is not UTF-8: save the file as UTF-8"):
        read(tmp_path / "latin.jsonl")
