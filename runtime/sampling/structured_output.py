"""Structured output: what a request's text must be, such as JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from adalink.runtime.arguments import check_flag
from adalink.runtime.errors import RequestError
from adalink.runtime.request import check_text

# Characters of a schema, expression or grammar. What is compiled from so many took at most 0.8 s.
MOST_CHARACTERS = 50_000


@dataclass(frozen=True)
class StructuredOutput:
    """What the text of a request must be; exactly one of the fields. The extra ``structured`` brings llguidance.

    vLLM's ``structured_outputs`` has the same. The text is complete where ``finish_reason`` is ``"stop"``. The budget,
    stop texts of the request, cancelling and deadlines may cut it.

    Attributes:
        json_schema: JSON of this schema, as a mapping or as its text. There is no white space between the parts, and
            properties come in the schema's order. Keywords that cannot be enforced, such as ``not``, are refused. A
            name that the schema leaves free may come twice; most readers take the last.
        regex: the whole text matches this regular expression, without look-around.
        grammar: the text is of this grammar, in llguidance's form of Lark.
        choices: the text is one of these.
        json_object: whether the text is any JSON object.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        check_flag(self.json_object, "json_object")
        names = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(names) != 1:
            expected = ", ".join(field.name for field in fields(self))
            raise RequestError(f"structured output has {', '.join(names) or 'nothing'}, expected one of {expected}")
        if len(self.source) > MOST_CHARACTERS:
            raise RequestError(
                f"{names[0]} has {len(self.source)} characters, expected at most {MOST_CHARACTERS}: simplify it"
            )

    @property
    def kind(self) -> str:
        """The field that says what the text must be."""
        return next(field.name for field in fields(self) if getattr(self, field.name) not in (None, False))

    @property
    def source(self) -> str:
        """That field as a text: of a schema and of choices, its JSON."""
        if self.json_object:
            return '{"type":"object"}'
        if self.json_schema is not None:
            return _schema_text(self.json_schema)
        if self.choices is not None:
            return _choices_text(self.choices)
        text = self.regex if self.grammar is None else self.grammar
        if not isinstance(text, str):
            raise RequestError(f"{self.kind} is {text!r:.80}, expected a text")
        return check_text(text, self.kind)


def _schema_text(schema: object) -> str:
    """A schema as JSON; raises ``RequestError``."""
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, Mapping):
            raise RequestError(f"json_schema is {schema!r:.80}, expected an object")
        # To the standard an unknown keyword; to llguidance, leave to let through what it cannot enforce.
        kept = {name: value for name, value in schema.items() if name != "x-guidance"}
        _check_free_names(kept)
        return json.dumps(kept, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"json_schema cannot be read as JSON: {error}") from error


def _check_free_names(schema: object) -> None:
    """Refuse a least number of properties whose names are free: one name twice would count as two."""
    if isinstance(schema, Mapping):
        least = schema.get("minProperties")
        is_free = schema.get("additionalProperties") is not False or "patternProperties" in schema
        if isinstance(least, (int, float)) and least > 1 and is_free:
            raise RequestError(
                f"json_schema has minProperties {least} with names that are free, which cannot be enforced: name the "
                'properties, and set "additionalProperties" to false'
            )
        for name, value in schema.items():
            if name not in ("const", "enum", "default", "examples"):
                _check_free_names(value)
    elif isinstance(schema, (list, tuple)):
        for value in schema:
            _check_free_names(value)


def _choices_text(choices: object) -> str:
    """Choices as JSON; raises ``RequestError``."""
    if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence) or not choices:
        raise RequestError(f"choices is {choices!r:.80}, expected a list of at least one text")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise RequestError(f"choices holds {choice!r:.80}, expected texts of at least one character")
        check_text(choice, "choices")
    return json.dumps(list(choices))
