"""Rows with prompts or conversations, and those that cannot be answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adalink.runtime.errors import AdaLinkError, DataError
from adalink.runtime.text.messages import ChatOptions


class PromptRow(NamedTuple):
    """A prompt with its task, its images, the second text of its pair, and its file and line if any.

    A conversation has ``messages`` and options of the chat template instead of a prompt. ``extras`` are the other
    columns of the row, which go into its answer.
    """

    prompt: str
    task: str | None
    images: tuple[Path | bytes, ...] = ()
    origin: str | None = None
    text_pair: str | None = None
    line: int = 0
    messages: list[dict[str, Any]] | None = None
    chat: ChatOptions | None = None
    extras: Mapping[str, Any] | None = None


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


def with_extras(answer: dict[str, Any], extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """An answer behind the other columns of its row; one that is named like a part of the answer is ``row_NAME``."""
    if not extras:
        return answer
    return {f"row_{name}" if name in answer else name: value for name, value in extras.items()} | answer
