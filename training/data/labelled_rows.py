"""Rows with labels, for tasks on encoders: of texts, of pairs of texts, and of parts of a text.

- ``{"text", "label"}``: one label, or a number for a regression; ``text_pair`` makes it a pair.
- ``{"text", "labels": [...]}``: any number of labels.
- ``{"text", "spans": [{"start", "end", "label"}]}``, in characters; or ``{"tokens": [...], "tags": [...]}`` with BIO
  tags, whose tokens are joined with spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import DataError
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import ANSWERED_ROW, Row, is_text, origin_of, read_table
from adalink.runtime.storage.head_spec import MULTI_LABEL, OUTSIDE, REGRESSION, SINGLE_LABEL, TOKENS, Head

EXPECTED = '{"text": "...", "label": "..."}'
# More labels than rows for each are texts, not labels.
_FEWEST_ROWS = 1.5
_NAMES = ("text", "text_pair", "label", "labels", "spans", "tokens", "tags")
_LABELS = {"text", "label", "labels", "tokens", "tags", "spans"}
_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d*)?([eE][-+]?\d+)?\s*", re.ASCII)


class LabelledSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a text: its first character, the one behind its last, and its kind."""

    start: int
    end: int
    label: str


class _Row(msgspec.Struct, frozen=True):
    """One row, in any of its forms."""

    text: str | None = None
    text_pair: str | None = None
    label: str | bool | int | float | None = None
    labels: list[str] | None = None
    spans: list[LabelledSpan] | None = None
    tokens: list[str] | None = None
    tags: list[str] | None = None


class LabelledRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row with its labels.

    Attributes:
        text: the text.
        text_pair: the second text of a pair.
        labels: its labels: exactly one of a task with one label.
        value: the number of a regression.
        spans: parts of the text, in order, none overlapping.
        line: its place in the file.
    """

    text: str
    text_pair: str | None = None
    labels: tuple[str, ...] = ()
    value: float = 0.0
    spans: tuple[LabelledSpan, ...] = ()
    line: int


def has_labels(source: str | Path | RowSource) -> bool:
    """Whether the first row of a file has a text or labels, and no prompt; raises ``DataError``."""
    source = RowSource.of(source)
    for row in read_table(source, ANSWERED_ROW):
        return not {"prompt", "messages"} & row.fields.keys() and bool(_LABELS & row.fields.keys())
    return False


def read_labelled_rows(
    source: str | Path | RowSource, problem_type: str | None = None
) -> tuple[str, list[LabelledRow]]:
    """Rows of a file, and their problem type.

    Args:
        source: the file, in any form that ``adalink.runtime.rows.table`` reads; every row has the same columns. Others
            than those above are not used, but one whose name is nearly that of a column which the row lacks is refused.
        problem_type: one of ``adalink.runtime.storage.head_spec.PROBLEM_TYPES``; by default what the rows look like. A
            label that is a number with a point is one of a regression, a whole number names a class. In CSV it is a
            regression where all labels are numbers and one has a point.

    Raises:
        DataError: a row has another form; the message names its place.
    """
    source = RowSource.of(source)
    rows = [(_read_row(row), row.line) for row in read_table(source, EXPECTED)]
    if is_text(source.path) and (problem_type == REGRESSION or (problem_type is None and _are_decimal(rows))):
        rows = [(_with_number(row, origin_of(source.path, line)), line) for row, line in rows]
    kind = problem_type or _problem_type([row for row, _ in rows])
    return kind, [_check_row(row, kind, origin_of(source.path, line), line) for row, line in rows]


def _read_row(row: Row) -> _Row:
    row.extras(_NAMES)
    if not _LABELS & row.fields.keys():
        row.text("text", EXPECTED)  # which says what columns there are
    try:
        return msgspec.convert({name: row.fields[name] for name in _NAMES if name in row.fields}, _Row)
    except msgspec.ValidationError as error:
        raise DataError(f"{row.origin}: {error}; expected {EXPECTED}") from error


def _are_decimal(rows: Sequence[tuple[_Row, int]]) -> bool:
    """Whether all labels of a CSV file are numbers, and one has a point."""
    labels = [row.label for row, _ in rows]
    return all(isinstance(label, str) and _NUMBER.fullmatch(label) for label in labels) and any(
        "." in str(label) for label in labels
    )


def _with_number(row: _Row, origin: str) -> _Row:
    if not isinstance(row.label, str):
        return row
    if not _NUMBER.fullmatch(row.label):
        raise DataError(f"{origin}: label is {row.label!r}, expected a number, as in other rows: a regression")
    return msgspec.structs.replace(row, label=float(row.label))


def _problem_type(rows: Sequence[_Row]) -> str:
    first = rows[0]
    if first.tokens is not None or first.spans is not None:
        return TOKENS
    if first.labels is not None:
        return MULTI_LABEL
    return REGRESSION if any(type(row.label) is float for row in rows) else SINGLE_LABEL


def _check_row(row: _Row, kind: str, origin: str, line: int) -> LabelledRow:
    given = {name for name in row.__struct_fields__ if getattr(row, name) is not None} - {"text_pair"}
    forms = {
        SINGLE_LABEL: [{"text", "label"}],
        MULTI_LABEL: [{"text", "labels"}],
        REGRESSION: [{"text", "label"}],
        TOKENS: [{"text", "spans"}, {"tokens", "tags"}],
    }[kind]
    if given not in forms or (kind == TOKENS and row.text_pair is not None):
        expected = " or ".join(" and ".join(sorted(form, reverse=True)) for form in forms)
        raise DataError(
            f"{origin}: columns are {', '.join(sorted(given)) or 'none'}, expected {expected} as for {kind}"
        )
    if kind == TOKENS:
        text, spans = (row.text or "", row.spans or []) if row.tokens is None else _join(row, origin)
        return LabelledRow(text=_text(text, origin), spans=_check_spans(text, spans, origin), line=line)
    text = _text(row.text or "", origin)
    if kind == REGRESSION:
        if not isinstance(row.label, (int, float)) or isinstance(row.label, bool) or not abs(row.label) < 1e30:
            raise DataError(f"{origin}: label is {row.label!r}, expected a number, as in other rows: a regression")
        return LabelledRow(text=text, text_pair=row.text_pair, value=float(row.label), line=line)
    names = row.labels or [] if kind == MULTI_LABEL else [_name(row.label, origin)]
    if len(set(names)) != len(names) or not all(names):
        raise DataError(f"{origin}: labels are {names}, expected different names, none empty")
    return LabelledRow(text=text, text_pair=row.text_pair, labels=tuple(names), line=line)


def _text(text: str, origin: str) -> str:
    if not text.strip():
        raise DataError(f"{origin}: the text is empty: give it words, or remove the row")
    return text


def _name(label: Any, origin: str) -> str:
    if isinstance(label, float):
        raise DataError(f"{origin}: label is {label!r}, a number with a point: expected a name or a whole number")
    return str(label).lower() if isinstance(label, bool) else str(label).strip()


def _join(row: _Row, origin: str) -> tuple[str, list[LabelledSpan]]:
    """Text and spans of tokens with BIO tags."""
    tokens, tags = row.tokens or [], row.tags or []
    if len(tokens) != len(tags):
        raise DataError(f"{origin}: {len(tokens)} tokens and {len(tags)} tags, expected a tag for each token")
    spans: list[LabelledSpan] = []
    start = 0
    kind = ""
    for token, tag in zip(tokens, tags, strict=True):
        begin, _, name = tag.partition("-")
        if tag != OUTSIDE and (begin not in ("B", "I") or not name):
            raise DataError(f"{origin}: tag {tag!r}, expected 'O', 'B-NAME' or 'I-NAME'")
        end = start + len(token)
        if begin == "I" and name == kind:
            spans[-1] = LabelledSpan(spans[-1].start, end, name)
        elif tag != OUTSIDE:
            spans.append(LabelledSpan(start, end, name))
        kind, start = name, end + 1
    return " ".join(tokens), spans


def _check_spans(text: str, spans: Sequence[LabelledSpan], origin: str) -> tuple[LabelledSpan, ...]:
    ordered = tuple(sorted(spans, key=lambda span: span.start))
    end = 0
    for span in ordered:
        if not end <= span.start < span.end <= len(text) or not span.label:
            raise DataError(
                f"{origin}: span {span.start} to {span.end} of {span.label!r}, expected one with a name, within the "
                f"{len(text)} characters of the text, and beside the others"
            )
        end = span.end
    return ordered


def names_of(row: LabelledRow) -> set[str]:
    """All labels of a row, and those of its spans."""
    return {*row.labels, *(span.label for span in row.spans)}


def find_labels(kind: str, rows: Sequence[LabelledRow], origin: str | Path) -> tuple[str, ...]:
    """The labels of a head for these rows, sorted; whole numbers by their size.

    Raises:
        DataError: there are too few, or nearly as many as rows.
    """
    if kind == REGRESSION:
        return ("value",)
    if kind == TOKENS:
        names = sorted({span.label for row in rows for span in row.spans})
        if not names:
            raise DataError(f"{origin}: no row has a span or a tag other than 'O': there is nothing to learn")
        return (OUTSIDE, *(f"{begin}-{name}" for name in names for begin in "BI"))
    counts = Counter(label for row in rows for label in row.labels)
    least = 2 if kind == SINGLE_LABEL else 1
    if len(counts) < least:
        raise DataError(f"{origin}: the rows have {len(counts)} labels, expected at least {least}")
    if kind == SINGLE_LABEL and len(counts) > 10 and len(rows) < _FEWEST_ROWS * len(counts):
        raise DataError(
            f"{origin}: {len(counts)} labels in {len(rows)} rows, expected several rows for each: is this a file of "
            "prompts and completions?"
        )
    is_number = all(label.isdecimal() for label in counts)
    return tuple(sorted(counts, key=(lambda label: (int(label), label)) if is_number else None))


def check_labels(head: Head, rows: Sequence[LabelledRow], origin: str | Path) -> None:
    """Check that rows have the labels of a head alone; raises ``DataError``."""
    known = set(head.labels)
    for row in rows:
        names = [f"B-{span.label}" for span in row.spans] if head.problem_type == TOKENS else list(row.labels)
        if unknown := sorted(set(names) - known):
            raise DataError(
                f"{origin_of(Path(origin), row.line)}: label {unknown[0].removeprefix('B-')!r} is in no row of the "
                "training: remove the row, or add such rows there"
            )
