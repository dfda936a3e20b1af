"""Fields that this server knows and does not have: asking for one is an error, never a silently other answer."""

from __future__ import annotations

from typing import Any

from adalink.serving.api_error import ApiError
from adalink.serving.openai.fields import GenerateFields

# Field -> values that ask for nothing, beside null and leaving it out.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "add_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "chat_template": (),
}
# Where another value does ask for nothing: a template's own tokens are all there are.
_CHAT_NOTHING = {"add_special_tokens": (False,)}


def refuse_unsupported(fields: GenerateFields) -> None:
    """Raise ``ApiError`` (400) for the first field that asks for what this server does not have.

    ``best_of`` may equal ``n``, which is what it does then.
    """
    is_chat = hasattr(fields, "messages")
    for name, nothing in _NOTHING.items():
        value = getattr(fields, name, None)
        allowed = _CHAT_NOTHING.get(name, nothing) if is_chat else nothing
        if name == "best_of":
            allowed = (fields.n or 1,)
        if value is not None and value not in allowed:
            raise ApiError(400, f"{name} is {value!r:.80}, which is not supported here: leave it out", name)
