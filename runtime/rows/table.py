"""The one reader of rows: every form of file, columns by the kit's own names, and templates of prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from adalink.runtime.errors import DataError
from adalink.runtime.rows.delimited import read_delimited
from adalink.runtime.rows.jsonl import decode_line, read_jsonl
from adalink.runtime.rows.lines import name_of
from adalink.runtime.rows.parquet import read_arrow, read_parquet
from adalink.runtime.rows.shards import find_shards
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.decoding import decode_json

_DELIMITED = (".csv", ".tsv", ".tab")
_PARQUET = (".parquet", ".pq")
# Columns whose cells of a CSV file hold JSON, and those that an empty cell leaves out.
_NESTED = ("labels", "spans", "tokens", "tags", "images", "messages", "tools", "documents", "chat_template_kwargs")
_OPTIONAL = (*_NESTED, "task", "text_pair")

_PAIR = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

# A row that says what is right, of either form.
ANSWERED_ROW = '{"text": "...", "label": "..."} or {"prompt": "...", "completion": "..."}'

Skip = Callable[[int, DataError], None]


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        fields: its values by column, the kit's own names where ``--map`` gives them.
        line: its first line in the file; its number in JSON lists and Parquet.
        origin: file and line, for messages.
        hidden: values of columns whose name another was mapped to.
    """

    fields: dict[str, Any]
    line: int
    origin: str
    hidden: dict[str, Any]

    def text(self, name: str, expected: str) -> str:
        """The text of a column; ``expected`` is the form of a row. Raises ``DataError``."""
        value = self.fields.get(name)
        if isinstance(value, str):
            return value
        if name in self.fields:
            raise DataError(f"{self.origin}: {name} is {value!r:.60}, expected a text, as in {expected}")
        raise DataError(
            f"{self.origin}: expected {expected}, and there is no column {name!r}; there are "
            f"{', '.join(self.fields)[:200] or 'none'}: rename one, or say which with --map {name}=COLUMN"
        )

    def extras(self, known: Collection[str]) -> dict[str, Any]:
        """Columns that are none of ``known``.

        Raises:
            DataError: the name of one is nearly that of a known one which the row lacks: it may be misspelt.
        """
        extras = {name: value for name, value in self.fields.items() if name not in known}
        lacking = tuple(name for name in known if name not in self.fields) if extras else ()
        for name in extras:
            if meant := _misspelt(name, lacking):
                raise DataError(f"{self.origin}: field {name!r} is none of a row's: did you mean {meant!r}?")
        return extras | self.hidden


@lru_cache
def _misspelt(name: str, lacking: tuple[str, ...]) -> str | None:
    """The name that is nearly this one."""
    return next(iter(get_close_matches(name.lower(), lacking, 1, cutoff=0.85)), None)


def read_table(source: RowSource | Path | str, expected: str, skip: Skip | None = None) -> Iterator[Row]:
    """Rows of a file, in order.

    The end of the name tells the form: ``.csv``; ``.tsv`` or ``.tab``; ``.parquet`` or ``.pq``; ``.json``, a list or
    one row a line. Any other name has one JSON object a line. ``-`` is standard input, and ``-.csv`` and ``-.tsv`` are
    CSV from there. A folder is a data set (``adalink.runtime.rows.shards``). Cells of CSV are texts, but for lists such
    as ``images``, which are JSON; an empty cell leaves an optional column out.

    Args:
        source: the file, with names of columns and a template.
        expected: form of a row, such as ``'{"prompt": "..."}'``, for messages.
        skip: called with line and error of a row of another form, which is left out; without it the error is raised.

    Raises:
        DataError: the file cannot be read or has no rows, or a row has another form; the message names it.
    """
    source = RowSource.of(source)
    is_empty, is_numbered = True, _is_numbered(source.path)

    def leave_out(line: int, error: DataError) -> None:
        nonlocal is_empty
        is_empty = False
        if skip is None:
            raise error
        skip(line, error)

    for line, values in _values(source.path, expected, leave_out):
        is_empty = False
        origin = f"{source.path}: row {line}" if is_numbered else f"{name_of(source.path)}:{line}"
        try:
            yield _make_row(values, line, source, origin, expected)
        except DataError as error:
            leave_out(line, error)
    if is_empty:
        raise DataError(f"{name_of(source.path)} holds no rows; expected rows {expected}")


def origin_of(path: Path, line: int) -> str:
    """A row's file and place, for messages."""
    return f"{name_of(path)}: row {line}" if _is_numbered(path) else f"{name_of(path)}:{line}"


def is_text(path: Path) -> bool:
    """Whether all values of a file are texts."""
    return path.suffix.lower() in _DELIMITED


def _is_numbered(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in _PARQUET or find_shards(path) is not None or (suffix == ".json" and _begins_a_list(path))


def _values(path: Path, expected: str, skip: Skip) -> Iterator[tuple[int, Any]]:
    """Place and values of each row."""
    if (shards := find_shards(path)) is not None:
        return _number(chain.from_iterable(map(_read_shard, shards)))
    if path.suffix.lower() in _PARQUET:
        return read_parquet(path)
    if is_text(path):
        return read_delimited(path, skip)
    if _is_numbered(path):
        return _read_list(path, expected, skip)
    return read_jsonl(path, expected, _decode, skip)


def _read_shard(path: Path) -> Iterator[tuple[int, Any]]:
    return read_arrow(path) if path.suffix.lower() == ".arrow" else read_parquet(path)


def _number(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Rows of several files, with one count."""
    return ((number, values) for number, (_, values) in enumerate(rows, start=1))


def _decode(text: str) -> Any:
    try:
        return decode_json(text, object)
    except ValueError as error:
        if half := _HALF.search(_PAIR.sub("", text)):  # msgspec calls it truncated
            raise ValueError(f"it holds {half[0]}, half of a character") from error
        raise ValueError(str(error)) from error  # a value of no other type than JSON's: its text is wrong


def _begins_a_list(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError:
        return False  # reading it says why


def _read_list(path: Path, expected: str, skip: Skip) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list, which is held as bytes; each row is decoded when its turn comes."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        data.decode()
        entries = decode_json(data, list[msgspec.Raw])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a JSON file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}; expected a list of rows {expected}") from error
    for number, entry in enumerate(entries, start=1):
        try:
            value = decode_line(bytes(entry).decode(), f"{path}: row {number}", expected, _decode)
        except DataError as error:
            skip(number, error)
            continue
        yield number, value


def _make_row(values: Any, line: int, source: RowSource, origin: str, expected: str) -> Row:
    """A row of the values of one place; raises ``DataError``."""
    if not isinstance(values, dict):
        received = msgspec.json.encode(values).decode()[:80]
        raise DataError(f"{origin}: expected {expected}, received {received}")
    fields, hidden = source.rename(values, origin)
    if is_text(source.path):
        _read_cells(fields, origin)
    if source.template is not None:
        source.apply_template(fields, values, origin)
    return Row(fields, line, origin, hidden)


def _read_cells(fields: dict[str, Any], origin: str) -> None:
    """Lists from the cells that hold them; optional columns without a value are taken out."""
    for name in _OPTIONAL:
        cell = fields.get(name)
        if cell is None:
            continue
        if not cell.strip():
            del fields[name]
        elif name in _NESTED:
            try:
                fields[name] = _decode(cell)
            except ValueError as error:
                raise DataError(
                    f"{origin}: column {name!r} is {cell[:60]!r}, expected JSON, such as "
                    f"""{'["a", "b"]' if name != "messages" else '[{"role": "user", "content": "..."}]'}: {error}"""
                ) from error


__all__ = ["Row", "RowSource", "is_text", "origin_of", "read_table"]
