"""Prompts from the rows of a JSON-lines file."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.jsonl import read_jsonl

_FIELDS = ("prompt", "task", "images")
_EXPECTED = '{"prompt": text, "task": name or null}'


class PromptRow(NamedTuple):
    """A prompt with its task, its images, and its file and line if any."""

    prompt: str
    task: str | None
    images: tuple[Path, ...] = ()
    origin: str | None = None


def read_rows(path: Path, task: str | None) -> list[PromptRow]:
    """Prompts, tasks and images of a JSON-lines file.

    Args:
        path: rows ``{"prompt": str, "task": str | null, "images": [path, ...]}``; ``task`` and ``images`` may be left
            out. Paths of images start at the file's folder. Other fields, such as a training row's, are not read,
            but one that is nearly a row's own is refused: the base model would answer a misspelt task.
        task: for rows that name none.

    Raises:
        DataError: a line is not such a row; the message names it.
    """
    return [
        _check_row(row, task, path.parent, f"{path}:{number}")
        for number, row in read_jsonl(path, _EXPECTED, json.loads)
    ]


def _check_row(row: Any, task: str | None, folder: Path, origin: str) -> PromptRow:
    """A row of what one line holds; raises ``DataError``."""
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f"{origin}: expected {_EXPECTED}, received {json.dumps(row)[:80]}")
    try:
        check_text(row["prompt"], "prompt")
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
    return PromptRow(row["prompt"], row_task, tuple(folder / image for image in images), origin)
