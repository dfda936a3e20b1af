"""Texts from the rows of a file, for the verbs that answer without generating."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import Row, read_table

T = TypeVar("T")

_FIELDS = ("text", "text_pair", "task")
_EXPECTED = '{"text": text, "task": name or null}'


class TextRow(NamedTuple):
    """A text, the second text of its pair, its task, where it stands, and the other columns of its row."""

    text: str
    text_pair: str | None
    task: str | None
    origin: str
    extras: Mapping[str, Any] | None = None


def read_texts(source: RowSource | Path, task: str | None) -> list[TextRow]:
    """Texts and tasks of a file.

    Args:
        source: rows ``{"text": str, "text_pair": str | null, "task": str | null}`` in any form that
            ``adalink.runtime.rows.table`` reads; all but the text may be left out. Other fields are carried along, but
            one that is nearly a row's own is refused.
        task: for rows that name none.

    Raises:
        DataError: a row has another form; the message names it.
    """
    return [_check_row(row, task) for row in read_table(source, _EXPECTED)]


def prepare_rows(rows: Sequence[TextRow], prepare: Callable[[Sequence[TextRow]], Sequence[T]]) -> Sequence[T]:
    """What ``prepare`` makes of all rows; its ``RequestError`` names the line of the first row that is at fault."""
    try:
        return prepare(rows)
    except RequestError as error:
        for row in rows if rows[0].origin else ():
            try:
                prepare([row])
            except RequestError as own:
                raise type(own)(f"{row.origin}: {str(own).removeprefix('text 0: ')}") from error
        raise


def _check_row(row: Row, task: str | None) -> TextRow:
    fields, origin = row.fields, row.origin
    text = row.text("text", _EXPECTED)
    extras = row.extras(_FIELDS)
    pair, row_task = fields.get("text_pair"), fields.get("task", task)
    for name, value in (("text_pair", pair), ("task", row_task)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{origin}: {name} is {value!r:.80}, expected a text or null")
    try:
        check_text(text, "text")
        check_text(pair or "", "text_pair")
    except RequestError as error:
        raise DataError(f"{origin}: {error}") from error
    return TextRow(text, pair, row_task, origin, extras)
