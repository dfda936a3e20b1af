"""Structured output of requests: OpenAI's ``response_format``, and vLLM's ``structured_outputs`` and ``guided_...``."""

from __future__ import annotations

from typing import Any

from adalink.runtime.errors import RequestError
from adalink.runtime.sampling.structured_output import StructuredOutput
from adalink.serving.api_error import ApiError
from adalink.serving.openai.fields import GenerateFields

# vLLM's names of what the text must be -> the runtime's.
_KINDS = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choices",
    "grammar": "grammar",
    "json_object": "json_object",
}


def structured_output(fields: GenerateFields) -> StructuredOutput | None:
    """What the text must be; ``None`` for any text. Raises ``ApiError`` (400) for two wishes, or a wrong one."""
    wishes: dict[str, dict[str, Any]] = {}
    if (wish := _response_format(fields.response_format)) is not None:
        wishes["response_format"] = wish
    if fields.structured_outputs is not None:
        wishes["structured_outputs"] = _vllm(fields.structured_outputs)
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(fields, f"guided_{kind}")) is not None:
            wishes[f"guided_{kind}"] = {_KINDS[kind]: value}
    if len(wishes) > 1:
        raise ApiError(400, f"{' and '.join(wishes)} exclude each other: give one", next(iter(wishes)))
    for field, wish in wishes.items():
        try:
            return StructuredOutput(**wish)
        except RequestError as error:
            raise ApiError(400, f"{field}: {error}", field) from error
    return None


def _response_format(form: dict[str, Any] | None) -> dict[str, Any] | None:
    """The runtime's fields for OpenAI's ``response_format``; ``None`` for any text."""
    kind = None if form is None else form.get("type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    inner = form.get("json_schema")
    if kind == "json_schema" and isinstance(inner, dict) and "schema" in inner:
        return {"json_schema": inner["schema"]}
    raise ApiError(
        400,
        "response_format: expected the type 'text', 'json_object', or 'json_schema' with json_schema.schema",
        "response_format",
    )


def _vllm(wish: dict[str, Any]) -> dict[str, Any]:
    """The runtime's fields for vLLM's ``structured_outputs``."""
    asked = {name: value for name, value in wish.items() if value is not None}
    if unknown := asked.keys() - _KINDS.keys():
        message = f"structured_outputs has {sorted(unknown)[0]!r:.40}, expected one of {', '.join(_KINDS)}"
        raise ApiError(400, message, "structured_outputs")
    return {_KINDS[name]: value for name, value in asked.items()}
