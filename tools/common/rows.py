"""Prompts from the rows of a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from adalink.runtime.errors import AdaLinkError, DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.jsonl import read_jsonl
from adalink.runtime.text.messages import ChatOptions

_FIELDS = ("prompt", "task", "images", "text_pair")
_EXPECTED = '{"prompt": text, "task": name or null}'


class PromptRow(NamedTuple):
    """A prompt with its task, its images, the second text of its pair, and its file and line if any.

    A conversation has ``messages`` and options of the chat template instead of a prompt.
    """

    prompt: str
    task: str | None
    images: tuple[Path | bytes, ...] = ()
    origin: str | None = None
    text_pair: str | None = None
    line: int = 0
    messages: list[dict[str, Any]] | None = None
    chat: ChatOptions | None = None


class BadRows:
    """Rows that cannot be answered, by line: the first one ends the run, or all are collected.

    Attributes:
        errors: the error of each line, if they are collected.
    """

    def __init__(self, *, skip: bool) -> None:
        self._skip = skip
        self.errors: dict[int, AdaLinkError] = {}

    def add(self, line: int, error: AdaLinkError) -> None:
        """Add a row, or raise its error."""
        if not self._skip:
            raise error
        self.errors[line] = error

    def among(self, rows: Iterable[PromptRow], answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers of ``rows``, and the errors, in the order of lines."""
        left = sorted(self.errors.items(), reverse=True)
        for row, answer in zip(rows, answers, strict=True):
            while left and left[-1][0] < row.line:
                yield _described(*left.pop())
            yield answer
        yield from (_described(*pair) for pair in reversed(left))

    def finish(self) -> None:
        """Raise ``DataError`` if there were any."""
        if self.errors:
            line, error = min(self.errors.items())
            raise DataError(f"{len(self.errors)} rows could not be answered, the first in line {line}: {error}")


def _described(line: int, error: AdaLinkError) -> dict[str, Any]:
    return {"line": line, "error": str(error)}


def read_rows(path: Path, task: str | None, bad: BadRows | None = None) -> list[PromptRow]:
    """Prompts, tasks and images of a JSON-lines file.

    Args:
        path: rows ``{"prompt": str, "task": str | null, "images": [path, ...], "text_pair": str}``; all but the prompt
            may be left out. Paths of images start at the file's folder. Other fields, such as a training row's, are
            not read, but one that is nearly a row's own is refused: the base model would answer a misspelt task.
        task: for rows that name none.
        bad: takes lines that are not such rows.

    Raises:
        DataError: a line is not such a row; the message names it.
    """
    bad, rows = bad or BadRows(skip=False), []
    for number, row in read_jsonl(path, _EXPECTED, json.loads, bad.add):
        try:
            rows.append(_check_row(row, task, path, number))
        except DataError as error:
            bad.add(number, error)
    return rows


def _check_row(row: Any, task: str | None, path: Path, line: int) -> PromptRow:
    """A row of what one line holds; raises ``DataError``."""
    origin = f"{path}:{line}"
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{origin}: expected {_EXPECTED}, received {json.dumps(row)[:80]}")
    text_pair = row.get("text_pair")
    if text_pair is not None and not isinstance(text_pair, str):
        raise DataError(f"{origin}: text_pair is {text_pair!r:.80}, expected a text")
    try:
        check_text(row["prompt"], "prompt")
        check_text(text_pair or "", "text_pair")
    except RequestError as error:
        raise DataError(f"{origin}: {error}") from error
    for name in row.keys() - set(_FIELDS):
        if meant := get_close_matches(name.lower(), _FIELDS, 1, cutoff=0.85):
            raise DataError(f"{origin}: field {name!r} is none of a row's: did you mean {meant[0]!r}?")
    row_task = row.get("task", task)
    if row_task is not None and not isinstance(row_task, str):
        raise DataError(f"{origin}: task is {row_task!r}, expected a name or null")
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{origin}: images is {str(images)[:80]}, expected a list of paths")
    return PromptRow(row["prompt"], row_task, tuple(path.parent / image for image in images), origin, text_pair, line)
