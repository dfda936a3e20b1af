"""Conversations from a file: one as JSON, or one a line as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.rows.jsonl import read_jsonl
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.text.messages import ChatOptions, check_conversation, images_of
from adalink.tools.rows.prompt_rows import BadRows, PromptRow

_EXPECTED = '{"messages": [{"role": "user", "content": text}, ...]}'
_FIELDS = {"messages", "task", "tools", "documents", "chat_template_kwargs"}
_FLAGS = {"add_generation_prompt", "continue_final_message"}
CONVERSATION_FIELDS = _FIELDS | _FLAGS


def is_rows(path: Path) -> bool:
    """Whether a file holds a conversation a line, rather than one conversation."""
    return path.suffix == ".jsonl"


def read_conversations(path: Path, task: str | None, bad: BadRows) -> list[PromptRow]:
    """Conversations of a file, in the form of OpenAI's chat API.

    Args:
        path: a list of messages, or an object with ``messages`` and optionally ``tools``, ``documents``,
            ``chat_template_kwargs``, ``add_generation_prompt``, ``continue_final_message`` and ``task``; in a file
            ``.jsonl``, one of them a line. Paths of images start at the file's folder.
        task: for conversations that name none.
        bad: takes lines that are no such conversation.

    Raises:
        DataError: the file, or a conversation in it, has another form; the message names the line.
    """
    if not is_rows(path):
        return [_check(_read_json(path), task, path, 0)]
    rows = []
    for number, value in read_jsonl(path, _EXPECTED, _decode, bad.add):
        try:
            rows.append(_check(value, task, path, number))
        except DataError as error:
            bad.add(number, error)
    return rows


def _decode(text: bytes | str) -> Any:
    return decode_json(text, object)


def _read_json(path: Path) -> Any:
    try:
        return _decode(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a JSON file") from error
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON: {error}; expected {_EXPECTED}; a conversation a line is for .jsonl"
        ) from error


def _check(value: Any, task: str | None, path: Path, line: int) -> PromptRow:
    """A row of one conversation; raises ``DataError``."""
    return check_conversation_row(value, task, path.parent, f"{path}:{line}" if line else str(path), line)


def check_conversation_row(value: Any, task: str | None, folder: Path, origin: str, line: int) -> PromptRow:
    """A row of one conversation.

    Args:
        value: the messages, or an object that has them, as in ``read_conversations``.
        task: for a conversation that names none.
        folder: where paths of images start.
        origin: its file and place, for messages.
        line: its line, 0 for the only conversation of a file.

    Raises:
        DataError: it is no conversation.
    """
    if not isinstance(value, list) and not (isinstance(value, dict) and "messages" in value):
        raise DataError(f"{origin}: expected {_EXPECTED}, received {json.dumps(value)[:80]}")
    row: dict[str, Any] = dict(value) if isinstance(value, dict) else {"messages": value}
    if unknown := sorted(row.keys() - _FIELDS - _FLAGS):
        raise DataError(f"{origin}: field {unknown[0]!r} is not known; expected {sorted(_FIELDS | _FLAGS)}")
    row_task = row.get("task", task)
    if row_task is not None and not isinstance(row_task, str):
        raise DataError(f"{origin}: task is {row_task!r}, expected a name or null")
    flags = {name: row[name] for name in _FLAGS if name in row}
    options = ChatOptions(row.get("tools"), row.get("documents"), row.get("chat_template_kwargs") or {}, **flags)
    try:
        check_conversation(row["messages"])
        options.variables()
        images = images_of(row["messages"])
    except RequestError as error:
        raise DataError(f"{origin}: {error}") from error
    files = tuple(folder / image if isinstance(image, str) else image for image in images)
    return PromptRow("", row_task, files, origin, line=line, messages=row["messages"], chat=options)
