"""JSON-lines files: one JSON value a line, with line numbers for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from adalink.runtime.errors import DataError
from adalink.runtime.rows.lines import name_of, read_lines

T = TypeVar("T")


def read_jsonl(
    path: Path, expected: str, decode: Callable[[str], T], skip: Callable[[int, DataError], None] | None = None
) -> Iterator[tuple[int, T]]:
    """Rows of a JSON-lines file, in order; empty lines and a byte order mark are skipped.

    Only a line feed ends a line: JSON texts may contain other Unicode separators.

    Args:
        path: the file, in UTF-8; ``-`` for standard input.
        expected: form of a line, such as ``'{"prompt": "..."}'``, for messages.
        decode: decodes a line into a row; raises as ``json.loads`` or ``msgspec`` does.
        skip: called with number and error of a line of another form, which is left out; without it the error is raised.

    Yields:
        Line number, from 1, and row.

    Raises:
        DataError: the file cannot be read or has no rows, or a line has another form; the message names it.
    """
    is_empty = True
    for number, line in read_lines(path, "a JSONL file"):
        if line.strip():
            is_empty = False
            try:
                row = decode_line(line, f"{name_of(path)}:{number}", expected, decode)
            except DataError as error:
                if skip is None:
                    raise
                skip(number, error)
                continue
            yield number, row
    if is_empty:
        raise DataError(f"{name_of(path)} holds no rows; expected lines {expected}")


def decode_line(line: str, origin: str, expected: str, decode: Callable[[str], T]) -> T:
    """The row of one line; raises ``DataError``."""
    try:
        return decode(line)
    except msgspec.ValidationError as error:
        raise DataError(f"{origin}: {error}; expected {expected}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}; expected {expected}") from error
