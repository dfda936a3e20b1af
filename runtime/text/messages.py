"""Conversations: messages with roles, checked and brought into the form that chat templates read."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from adalink.runtime.errors import RequestError
from adalink.runtime.request import check_text
from adalink.runtime.storage.decoding import decode_json

# One message, such as {"role": "user", "content": "Hello"}.
Message = Mapping[str, Any]
Conversation = Sequence[Message]
# One conversation, or several.
Messages = Conversation | Sequence[Conversation]

# Names of a message's reasoning; templates read the first, those of older models the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 64
_TEXT_OR_PARTS = 'a text or a list of {"type": "text", "text": ...} and {"type": "image"}'


@dataclass(frozen=True)
class ChatOptions:
    """How the chat template is applied.

    Attributes:
        tools: JSON schemas of functions that the model may call, as in OpenAI's and transformers' APIs.
        documents: documents for retrieval, each with ``title`` and ``text``.
        template_kwargs: further variables of the template, such as ``enable_thinking``.
        add_generation_prompt: end with the beginning of a reply.
        continue_final_message: leave the last message open, so that the model continues it.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def variables(self) -> dict[str, Any]:
        """Variables of the template, as plain values; raises ``RequestError``."""
        for name in ("add_generation_prompt", "continue_final_message"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r:.80}, expected true or false")
        for name in ("tools", "documents"):
            _check_objects(getattr(self, name), name)
        if not isinstance(self.template_kwargs, Mapping):
            raise RequestError(f"chat_template_kwargs is {self.template_kwargs!r:.80}, expected names and values")
        reserved = {"messages", "tools", "documents", "add_generation_prompt"} & self.template_kwargs.keys()
        if reserved:
            raise RequestError(f"chat_template_kwargs holds {sorted(reserved)[0]!r}, which has an option of its own")
        given = {"tools": self.tools, "documents": self.documents, **self.template_kwargs}
        values: dict[str, Any] = {name: plain(value, name) for name, value in given.items()}
        open_end = self.add_generation_prompt and not self.continue_final_message
        return {"add_generation_prompt": open_end, **values}


def check_conversation(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Messages of one conversation as plain values, without images' data.

    Empty fields are left out, reasoning gets its names, and arguments of tool calls become objects where they are
    JSON texts, as chat templates expect.

    Args:
        messages: the messages, each with ``role`` and ``content``.
        name: their name in errors.

    Raises:
        RequestError: a message is not a mapping, lacks its role or content, or holds what is no JSON value.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            f'{name} is {messages!r:.80}, expected a list of messages such as {{"role": "user", "content": "Hello"}}'
        )
    return [_check_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def as_options(chat: Any) -> ChatOptions | None:
    """The options that ``chat`` stands for, ``None`` without a chat template; raises ``RequestError``."""
    if isinstance(chat, ChatOptions):
        return chat
    if not isinstance(chat, bool):
        raise RequestError(f"chat is {chat!r:.80}, expected true, false or ChatOptions")
    return ChatOptions() if chat else None


def split_batch(messages: Any) -> list[Conversation]:
    """The conversations of a batch, of which a list of messages is one; they are not checked yet."""
    is_list = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)) and bool(messages)
    is_batch = is_list and isinstance(messages[0], Sequence) and not isinstance(messages[0], (str, bytes))
    return list(messages) if is_batch else [messages]


def images_of(messages: Conversation, name: str = "messages") -> list[Any]:
    """Images in the parts of checked messages' originals, in order; raises ``RequestError``.

    A part ``{"type": "image", "image": ...}`` holds what ``images`` takes, and ``{"type": "image_url", "image_url":
    {"url": "data:..."}}`` the bytes of a file. A part ``{"type": "image"}`` alone is a placeholder.

    Args:
        messages: messages that ``check_conversation`` has accepted.
        name: their name in errors.
    """
    found, empty = [], 0
    for where, part in _image_parts(messages, name):
        if part["type"] == "image_url":
            found.append(_data_of(part, where))
        elif part.get("image") is not None:
            found.append(part["image"])
        else:
            empty += 1
    if found and empty:
        raise RequestError(f"{name} holds images and empty image parts: give every part its image, or none")
    return found


def count_images(messages: Conversation) -> int:
    """Number of parts that are images."""
    return sum(1 for _ in _image_parts(messages, ""))


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy of JSON values in Python's own types; raises ``RequestError`` for anything else."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(check_text(value, name))
    if depth > _MAX_DEPTH:
        raise RequestError(f"{name} is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{name} has the key {key!r:.80}, expected a text")
        return {
            check_text(key, f"a key of {name}"): plain(item, f"{name}.{key}", depth + 1) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise RequestError(f"{name} is a {type(value).__name__}, expected texts, numbers, lists and objects, as in JSON")


def _check_message(message: Any, name: str) -> dict[str, Any]:
    """One message as plain values; raises ``RequestError``."""
    if not isinstance(message, Mapping):
        raise RequestError(
            f'{name} is {message!r:.80}, expected an object such as {{"role": "user", "content": "Hello"}}'
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{name} has the role {role!r:.80}, expected a text such as 'user', 'assistant' or 'system'")
    content = message.get("content")
    if content is None and not any(message.get(key) for key in ("tool_calls", *_REASONING)):
        raise RequestError(f"{name} has no content: expected {_TEXT_OR_PARTS}")
    values = {key: value for key, value in message.items() if value is not None and key != "content"}
    checked: dict[str, Any] = plain(values, name)
    if content is not None:
        checked["content"] = _check_content(content, f"{name}.content")
    reasoning = next((checked[key] for key in _REASONING if key in checked), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return _with_parsed_arguments(checked, name)


def _check_content(content: Any, name: str) -> str | list[dict[str, Any]]:
    """Content of a message: a text, or parts; raises ``RequestError``."""
    if isinstance(content, str):
        return str(check_text(content, name))
    if not isinstance(content, (list, tuple)) or not content:
        raise RequestError(f"{name} is {content!r:.80}, expected {_TEXT_OR_PARTS}")
    return [_check_part(part, f"{name}[{index}]") for index, part in enumerate(content)]


def _check_part(part: Any, name: str) -> dict[str, Any]:
    """A part as templates read it: an image is a placeholder; raises ``RequestError``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        return {"type": "image"}
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{name} is {_short(part)}, expected a part of the type 'text', 'image' or 'image_url'")
    return {"type": "text", "text": check_text(part["text"], name)}


def _with_parsed_arguments(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The message with arguments of tool calls as objects; OpenAI's API has them as JSON texts."""
    if "tool_calls" not in message:
        return message
    calls = message["tool_calls"]
    _check_objects(calls, f"{name}.tool_calls")
    for call in calls:
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
            try:
                function["arguments"] = decode_json(arguments or "{}", dict[str, Any])
            except msgspec.DecodeError as error:
                raise RequestError(f"{name}.tool_calls: arguments are {arguments!r:.80}, expected an object") from error
    return message


def _image_parts(messages: Conversation, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for number, part in enumerate(content):
                if part["type"] != "text":
                    yield f"{name}[{index}].content[{number}]", part


def _data_of(part: Mapping[str, Any], name: str) -> bytes:
    """Bytes of an image that is a data URL; raises ``RequestError`` for any other address."""
    address = part.get("image_url")
    url = address.get("url") if isinstance(address, Mapping) else address
    header, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not header.startswith("data:") or not header.endswith(";base64"):
        raise RequestError(f"{name} has the address {url!r:.80}: expected 'data:...;base64,...', nothing is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is no base64: {error}") from error


def _check_objects(values: Any, name: str) -> None:
    if values is None:
        return
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} is {values!r:.80}, expected a list of objects")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RequestError(f"{name}[{index}] is {value!r:.80}, expected an object")


def _short(part: Any) -> str:
    return f"of the type {part.get('type')!r:.40}" if isinstance(part, Mapping) else f"{part!r:.80}"
