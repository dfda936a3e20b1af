"""Lines of a text file or of standard input, one at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from adalink.runtime.errors import DataError

_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def is_standard_input(path: Path) -> bool:
    """Whether a path is ``-``, or ``-`` with an end that tells the form of rows, such as ``-.csv``."""
    return path.stem == "-" and path.parent == Path()


def name_of(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if is_standard_input(path) else str(path)


def read_lines(path: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Lines of UTF-8 with their ends, and their numbers from 1. A byte order mark is left out.

    Only a line feed ends a line: texts may contain other Unicode separators. One line at a time is held.

    Args:
        path: the file; ``-`` or ``-.csv`` for standard input.
        kind: what the file should be, such as ``"a JSONL file"``, for messages.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; the message names byte and line.
    """
    start = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, _decode(line, start, number, path)
                start += len(line)
    except OSError as error:
        raise DataError(f"{name_of(path)}: cannot be read: {error.strerror}; expected {kind}") from error


def _open(path: Path) -> AbstractContextManager[IO[bytes]]:
    if not is_standard_input(path):
        return path.open("rb")
    if sys.stdin is None:
        raise DataError("standard input is closed: give it rows, or name a file")
    return contextlib.nullcontext(sys.stdin.buffer)


def _decode(line: bytes, start: int, number: int, path: Path) -> str:
    try:
        return (line.removeprefix(_MARK) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        before = len(_MARK) if number == 1 and line.startswith(_MARK) else 0
        form = ", it looks like UTF-16" if line.startswith(_UTF_16_MARKS) else ""
        raise DataError(
            f"{name_of(path)}: byte {start + before + error.start} is not UTF-8: save the file as UTF-8 (line "
            f"{number}{form})"
        ) from error
