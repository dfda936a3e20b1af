"""Conversations of clients: texts and images as data URLs. Nothing is fetched, and no path is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adalink.runtime.text.messages import ChatOptions
from adalink.serving.api_error import ApiError
from adalink.serving.openai.fields import ChatFields, TokenizeFields


def check_parts(messages: Sequence[dict[str, Any]]) -> None:
    """Refuse parts of messages that are neither a text nor an image as a data URL (``ApiError``, 400).

    The runtime reads parts that hold a path, which a client must not have.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            continue
        for number, part in enumerate(content):
            where = f"messages[{index}].content[{number}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                _check_address(part.get("image_url"), where)
            elif kind != "text":
                raise ApiError(400, f"{where} has the type {kind!r:.40}, expected 'text' or 'image_url'", where)


def chat_options(fields: ChatFields | TokenizeFields) -> ChatOptions:
    """How the chat template is applied."""
    asks_for_tools = getattr(fields, "tool_choice", None) != "none"
    open_end = fields.continue_final_message or False
    return ChatOptions(
        tools=(fields.tools or None) if asks_for_tools else None,
        documents=getattr(fields, "documents", None),
        template_kwargs=fields.chat_template_kwargs or {},
        add_generation_prompt=not open_end if fields.add_generation_prompt is None else fields.add_generation_prompt,
        continue_final_message=open_end,
    )


def _check_address(address: Any, where: str) -> None:
    url = address.get("url") if isinstance(address, dict) else address
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ApiError(
            400,
            f"{where} has the address {url!r:.80}, expected 'data:image/...;base64,...': nothing is fetched",
            where,
        )
