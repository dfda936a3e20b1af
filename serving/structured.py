"""What a client asks of a text's form: OpenAI's ``response_format``, and vLLM's fields."""

from __future__ import annotations

from typing import Any

from adalink.runtime.generation.structured_output import StructuredOutput
from adalink.serving.api_error import ApiError
from adalink.serving.fields import GenerateFields

# vLLM's older fields, and the names in its `structured_outputs`, by ours.
_GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "grammar",
}
_STRUCTURED = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choices",
    "grammar": "grammar",
    "json_object": "json_object",
}


def structured_output(fields: GenerateFields) -> StructuredOutput | None:
    """The form that a text must have; ``None`` for any.

    Raises:
        ApiError: the fields ask for two forms, or for one that is not known (400).
        RequestError: a schema, expression or grammar is wrong.
    """
    asked = [
        *_of_format(fields.response_format),
        *_of_mapping(fields.structured_outputs),
        *[(field, name, value) for field, name in _GUIDED.items() if (value := getattr(fields, field)) is not None],
    ]
    if not asked:
        return None
    if len(asked) > 1:
        raise ApiError(400, f"{asked[0][0]} and {asked[1][0]} both ask for a form: give one", asked[1][0])
    _, name, value = asked[0]
    return StructuredOutput(**{name: value})


def _of_format(value: dict[str, Any] | None) -> list[tuple[str, str, Any]]:
    kind = None if value is None else value.get("type")
    if value is None or kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", "json_object", True)]
    if kind == "json_schema":
        named = value.get("json_schema")
        if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
            raise ApiError(400, "response_format needs json_schema.schema, an object", "response_format")
        return [("response_format", "json_schema", named["schema"])]
    raise ApiError(
        400,
        f"response_format has the type {kind!r:.80}, expected 'text', 'json_object' or 'json_schema'",
        "response_format",
    )


def _of_mapping(value: Any) -> list[tuple[str, str, Any]]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ApiError(400, f"structured_outputs is {value!r:.80}, expected an object", "structured_outputs")
    found = []
    for key, entry in value.items():
        if entry is None or entry is False:
            continue
        if key not in _STRUCTURED:
            expected = ", ".join(_STRUCTURED)
            raise ApiError(400, f"structured_outputs has {key!r:.80}, expected {expected}", "structured_outputs")
        found.append(("structured_outputs", _STRUCTURED[key], entry))
    return found
