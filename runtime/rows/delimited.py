"""CSV and TSV: a header with the names of columns, then a row each, with texts as they stand in the cells."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from threading import Lock

from adalink.runtime.errors import DataError
from adalink.runtime.rows.lines import name_of, read_lines

# The longest cell, in characters. Python's own limit, 131,072, holds for the whole process: it is raised for each row
# alone, so that other users of `csv` keep theirs.
_LONGEST_CELL = 1 << 30
_LIMIT = Lock()
# Excel writes it as the first line, where a list separator is not the comma.
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)


def read_delimited(path: Path, skip: Callable[[int, DataError], None]) -> Iterator[tuple[int, dict[str, str]]]:
    r"""Rows of a CSV or TSV file, in order; empty lines and a byte order mark are left out.

    Cells are quoted as in RFC 4180: with ``"``, doubled inside, and may hold line breaks. A file ``.tsv`` or ``.tab``
    has tabs. One of another name has commas; or, where the header has none, the semicolons that Excel writes in many
    countries, or tabs. A column without a name is called ``column N``.

    Args:
        path: the file, in UTF-8; ``-`` for standard input.
        skip: called with line and error of a row with too many or too few cells; may raise the error.

    Yields:
        The row's first line, and its cells by column.

    Raises:
        DataError: the file cannot be read, has no header or two columns of one name, or a row has another form.
    """
    records = _records(path)
    header_line, names = next(records, (0, []))
    if not names:
        raise DataError(f"{name_of(path)} is empty, expected a header line with the names of columns, then rows")
    names = _check_header(names, f"{name_of(path)}:{header_line}")
    for line, cells in records:
        if len(cells) == len(names):
            yield line, dict(zip(names, cells, strict=True))
            continue
        error = DataError(
            f"{name_of(path)}:{line}: {len(cells)} cells, expected {len(names)} as in the header "
            f"({', '.join(names)[:80]}): put a cell that holds the separator or a line break into quotes"
        )
        skip(line, error)


def _check_header(cells: list[str], origin: str) -> list[str]:
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    if double := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"{origin}: column {double[0]!r} is {names.count(double[0])} times in the header, expected once: rename one"
        )
    return names


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """First line and cells of each row, the header's first."""
    lines = read_lines(path, "a CSV file")
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else _delimiter(first[1])
    has_separator_line = _SEPARATOR_LINE.fullmatch(first[1]) is not None
    numbered = lines if has_separator_line else chain([first], lines)
    last = first[0] if has_separator_line else first[0] - 1

    def texts() -> Iterator[str]:
        nonlocal last
        for number, line in numbered:
            if "\0" in line:
                raise DataError(f"{name_of(path)}:{number}: it holds a NUL character: save the file as CSV in UTF-8")
            last = number
            yield line

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        before = last
        try:
            cells = _next(reader)
        except csv.Error as error:
            raise DataError(
                f"{name_of(path)}:{before + 1}: not CSV: {error}; is a quote never closed, or one inside a cell not "
                "doubled?"
            ) from error
        if cells is None:
            return
        if cells:
            yield before + 1, cells


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    with _LIMIT:
        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(limit)


def _delimiter(header: str) -> str:
    if separator := _SEPARATOR_LINE.fullmatch(header):
        return separator[1]
    plain = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in (",", ";", "\t") if mark in plain), ",")
