"""Texts from the rows of a file, for the verbs that answer without generating."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.runtime.rows.table import Row, read_table
from adalink.tools.command_line.options import require_rows

T = TypeVar("T")
R = TypeVar("R")

# Texts between two lines of progress.
_TEXTS_AT_ONCE = 256

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


def given_texts(
    text: str | None, rows: Path | None, columns: tuple[str, ...], task: str | None, text_pair: str | None = None
) -> list[TextRow]:
    """The text of a command line, or those of its ``--rows``.

    Raises:
        click.UsageError: neither a text nor rows, or both, ``--map`` without rows, or a pair with them.
        AdaLinkError: a text or a row cannot be used.
    """
    if (text is None) == (rows is None):
        raise click.UsageError("give either TEXT or --rows")
    require_rows(rows is not None, "columns")
    if text_pair is not None and rows is not None:
        raise click.UsageError("--text-pair is for one text: name the pairs of --rows in its rows")
    if rows is not None:
        return read_texts(RowSource(rows, read_columns(columns)), task)
    return [TextRow(check_text(text or "", "TEXT"), text_pair, task, "")]


def answer_rows(
    rows: Sequence[TextRow], prepared: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]], doing: str
) -> Iterator[tuple[TextRow, T, R]]:
    """Each row with what was prepared of it and its result, in order, with progress on long files."""
    from adalink.tools.terminal.console import progress_bar

    with progress_bar() as progress:
        for start in range(0, len(rows), _TEXTS_AT_ONCE):
            if len(rows) > _TEXTS_AT_ONCE:
                progress(f"{doing}: {start} of {len(rows)} texts", start / len(rows))
            batch = prepared[start : start + _TEXTS_AT_ONCE]
            yield from zip(rows[start:], batch, compute(batch), strict=False)


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
