"""Texts from the rows of a JSON-lines file, for the verbs that answer without generating."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.jsonl import read_jsonl

T = TypeVar("T")

_FIELDS = ("text", "text_pair", "task")
_EXPECTED = '{"text": text, "task": name or null}'


class TextRow(NamedTuple):
    """A text, the second text of its pair, its task, and where it stands."""

    text: str
    text_pair: str | None
    task: str | None
    origin: str


def read_texts(path: Path, task: str | None) -> list[TextRow]:
    """Texts and tasks of a JSON-lines file.

    Args:
        path: rows ``{"text": str, "text_pair": str | null, "task": str | null}``; all but the text may be left out.
            Other fields are not read, but one that is nearly a row's own is refused.
        task: for rows that name none.

    Raises:
        DataError: a line is not such a row; the message names it.
    """
    return [_check_row(row, task, f"{path}:{number}") for number, row in read_jsonl(path, _EXPECTED, json.loads)]


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


def _check_row(row: Any, task: str | None, origin: str) -> TextRow:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{origin}: expected {_EXPECTED}, received {json.dumps(row)[:80]}")
    for name in row.keys() - set(_FIELDS):
        if meant := get_close_matches(name.lower(), _FIELDS, 1, cutoff=0.85):
            raise DataError(f"{origin}: field {name!r} is none of a row's: did you mean {meant[0]!r}?")
    pair, row_task = row.get("text_pair"), row.get("task", task)
    for name, value in (("text_pair", pair), ("task", row_task)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{origin}: {name} is {value!r:.80}, expected a text or null")
    try:
        check_text(row["text"], "text")
        check_text(pair or "", "text_pair")
    except RequestError as error:
        raise DataError(f"{origin}: {error}") from error
    return TextRow(row["text"], pair, row_task, origin)
