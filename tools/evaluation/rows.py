"""Rows with right answers, of every kind of task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import ANSWERED_ROW, read_table
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS

if TYPE_CHECKING:
    from adalink.training.data.labelled_rows import LabelledRow
    from adalink.training.data.rows import TrainingRow

# Kind of a task that gives text; the others are the problem types of heads.
TEXT = "text"
_OTHER_KINDS = {"labels": MULTI_LABEL, "spans": TOKENS, "tokens": TOKENS}

# A label of several, or a span: its first character, the one behind its last, and its kind.
Item: TypeAlias = "str | tuple[int, int, str]"


class Answer(NamedTuple):
    """An answer, right or given: a label or text, or several labels or spans, or a number."""

    text: str = ""
    items: frozenset[Item] = frozenset()
    value: float = 0.0


@dataclass(frozen=True)
class EvalRow:
    """A row with its right answer.

    Attributes:
        text: the text or prompt.
        expected: the right answer.
        line: its place in the file.
        text_pair: the second text of a pair.
        images: files of the images in a prompt.
        completion: of text, the right answer as the row has it.
    """

    text: str
    expected: Answer
    line: int
    text_pair: str | None = None
    images: tuple[Path, ...] = ()
    completion: str = ""


def read_eval_rows(source: RowSource | Path, kind: str) -> list[EvalRow]:
    """Rows of a file in any form that ``adalink.runtime.rows.table`` reads; other columns are not used.

    Args:
        source: the file.
        kind: ``TEXT`` or a problem type of heads.

    Raises:
        DataError: a row has another form; the message names it.
    """
    source = RowSource.of(source)
    if kind in (MULTI_LABEL, REGRESSION, TOKENS):
        from adalink.training.data.labelled_rows import read_labelled_rows

        return rows_with_labels(read_labelled_rows(source, kind)[1], kind)
    return [_check(row.fields, row.origin, row.line, source.path.parent) for row in read_table(source, ANSWERED_ROW)]


def rows_with_labels(rows: Iterable[LabelledRow], kind: str) -> list[EvalRow]:
    """Rows of a task with a head, as they are evaluated."""
    return [EvalRow(row.text, _labelled_answer(row, kind), row.line, row.text_pair) for row in rows]


def rows_with_completions(rows: Iterable[TrainingRow]) -> list[EvalRow]:
    """Rows of a task that gives text, as they are evaluated."""
    return [
        EvalRow(row.prompt or row.messages or "", Answer(row.completion.strip()), row.line, completion=row.completion)
        for row in rows
    ]


def _labelled_answer(row: LabelledRow, kind: str) -> Answer:
    if kind == SINGLE_LABEL:
        return Answer(row.labels[0])
    if kind == REGRESSION:
        return Answer(value=row.value)
    if kind == MULTI_LABEL:
        return Answer(items=frozenset(row.labels))
    return Answer(items=frozenset((span.start, span.end, span.label) for span in row.spans))


def _check(row: dict[str, Any], origin: str, line: int, folder: Path) -> EvalRow:
    for text, answer in (("prompt", "completion"), ("text", "label")):
        if text in row and answer in row:
            return _read(row, text, answer, origin, line, folder)
    if other := next((name for name in _OTHER_KINDS if name in row), None):
        raise DataError(
            f"{origin}: {other!r} is for a task of {_OTHER_KINDS[other]}, and this one gives one label or text: "
            f"expected {ANSWERED_ROW}"
        )
    raise DataError(f"{origin}: fields are {', '.join(map(str, row)) or 'none'}, expected {ANSWERED_ROW}")


def _read(row: dict[str, Any], text: str, answer: str, origin: str, line: int, folder: Path) -> EvalRow:
    expected, pair, images = row[answer], row.get("text_pair"), row.get("images") or []
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
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{origin}: images is {str(images)[:80]}, expected a list of paths")
    paths = tuple(folder / image for image in images)
    return EvalRow(row[text], Answer(expected.strip()), line, pair, paths, expected)
