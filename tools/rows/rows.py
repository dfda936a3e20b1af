"""Prompts from the rows of a file."""

from __future__ import annotations

from pathlib import Path

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import Row, read_table
from adalink.tools.rows.conversations import CONVERSATION_FIELDS, check_conversation_row
from adalink.tools.rows.prompt_rows import BadRows as BadRows
from adalink.tools.rows.prompt_rows import PromptRow as PromptRow

_FIELDS = ("prompt", "task", "images", "text_pair")
_EXPECTED = '{"prompt": text, "task": name or null}'


def read_rows(source: RowSource | Path, task: str | None, bad: BadRows | None = None) -> list[PromptRow]:
    """Prompts, tasks and images of a file.

    Args:
        source: rows ``{"prompt": str, "task": str | null, "images": [path, ...], "text_pair": str}`` in any form that
            ``adalink.runtime.rows.table`` reads; all but the prompt may be left out. Paths of images start at the
            file's folder. A row may have ``messages`` in place of a prompt. Other fields, such as a training row's,
            are carried along, but one that is nearly a row's own is refused: the base model would answer a misspelt
            task.
        task: for rows that name none.
        bad: takes rows of another form.

    Raises:
        DataError: a row has another form; the message names it.
    """
    bad, rows = bad or BadRows(skip=False), []
    folder = RowSource.of(source).path.parent
    for row in read_table(source, _EXPECTED, bad.add):
        try:
            rows.append(_check_row(row, task, folder))
        except DataError as error:
            bad.add(row.line, error)
    return rows


def _check_row(row: Row, task: str | None, folder: Path) -> PromptRow:
    """The prompt of a row; raises ``DataError``."""
    fields, origin = row.fields, row.origin
    if "messages" in fields and "prompt" not in fields:
        extras = row.extras(CONVERSATION_FIELDS)
        conversation = {name: value for name, value in fields.items() if name not in extras}
        return check_conversation_row(conversation, task, folder, origin, row.line)._replace(extras=extras)
    prompt, text_pair = row.text("prompt", _EXPECTED), fields.get("text_pair")
    if text_pair is not None and not isinstance(text_pair, str):
        raise DataError(f"{origin}: text_pair is {text_pair!r:.80}, expected a text")
    try:
        check_text(prompt, "prompt")
        check_text(text_pair or "", "text_pair")
    except RequestError as error:
        raise DataError(f"{origin}: {error}") from error
    extras = row.extras(_FIELDS)
    row_task = fields.get("task", task)
    if row_task is not None and not isinstance(row_task, str):
        raise DataError(f"{origin}: task is {row_task!r}, expected a name or null")
    images = fields.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(f"{origin}: images is {str(images)[:80]}, expected a list of paths")
    paths = tuple(folder / image for image in images)
    return PromptRow(prompt, row_task, paths, origin, text_pair, row.line, extras=extras)
