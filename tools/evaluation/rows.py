"""Rows with right answers: ``{"text", "label"}``, or ``{"prompt", "completion"}``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import read_table

_EXPECTED = '{"text": "...", "label": "..."} or {"prompt": "...", "completion": "..."}'


class EvalRow(NamedTuple):
    """A text or prompt, the second text of a pair, the right answer as the row has it, and the row's line."""

    text: str
    text_pair: str | None
    expected: str
    line: int

    @property
    def label(self) -> str:
        """The right answer, as a label."""
        return self.expected.strip()


def read_eval_rows(source: RowSource | Path) -> list[EvalRow]:
    """Rows of a file in any form that ``adalink.runtime.rows.table`` reads; other columns are not used.

    Raises:
        DataError: a row has another form; the message names it.
    """
    return [_check(row.fields, row.origin, row.line) for row in read_table(source, _EXPECTED)]


def _check(row: dict[str, Any], origin: str, line: int) -> EvalRow:
    for text, answer in (("prompt", "completion"), ("text", "label")):
        if text in row and answer in row:
            return _read(row, text, answer, origin, line)
    if "text" in row and (kind := next((name for name in ("labels", "spans") if name in row), None)):
        raise DataError(f"{origin}: {kind!r} is not evaluated here yet: training.json of the task has their measures")
    raise DataError(f"{origin}: fields are {', '.join(map(str, row)) or 'none'}, expected {_EXPECTED}")


def _read(row: dict[str, Any], text: str, answer: str, origin: str, line: int) -> EvalRow:
    if row.get("images"):
        raise DataError(f"{origin}: images are not evaluated here yet: training.json has the exact match of the task")
    expected, pair = row[answer], row.get("text_pair")
    if isinstance(expected, bool):
        expected = str(expected).lower()
    elif isinstance(expected, int):
        expected = str(expected)
    for name, value in ((text, row[text]), (answer, expected), ("text_pair", "-" if pair is None else pair)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{origin}: {name} is {value!r:.80}, expected a text that is not empty")
        try:
            check_text(value, name)
        except RequestError as error:
            raise DataError(f"{origin}: {error}") from error
    return EvalRow(row[text], pair, expected, line)
