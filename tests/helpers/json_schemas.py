"""A small part of JSON Schema: drawn schemas, and a check of values against them, written out here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

KEYS = ("a", "bc", "d e")


def draw_schema(rng: np.random.Generator, depth: int = 2) -> dict[str, Any]:
    """A random schema whose values are short."""
    kinds = ["string", "integer", "boolean", "null", "enum"] + ["object", "array", "anyOf"] * (depth > 0)
    kind = kinds[rng.integers(len(kinds))]
    low, more = int(rng.integers(-20, 20)), int(rng.integers(0, 9))
    if kind == "string":
        return {"type": "string", "minLength": more % 3, "maxLength": more % 3 + 2}
    if kind == "integer":
        return {"type": "integer", "minimum": low, "maximum": low + more}
    if kind == "enum":
        return {"enum": [["x", 'q"\\', 3, None, True, "yes", -2.5][rng.integers(7)] for _ in range(1 + more % 3)]}
    if kind == "array":
        return {"type": "array", "items": draw_schema(rng, depth - 1), "minItems": more % 2, "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [draw_schema(rng, depth - 1), draw_schema(rng, depth - 1)]}
    if kind == "object":
        names = KEYS[: 1 + more % 3]
        required = [name for name in names if rng.random() < 0.6]
        properties = {name: draw_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema of the keywords above."""
    if "anyOf" in schema:
        return any(is_valid(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(option) and value == option for option in schema["enum"])
    if not _TYPES[schema["type"]](value):
        return False
    if isinstance(value, str):
        return bool(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
    if _TYPES["integer"](value):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(is_valid(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        known = schema["properties"]
        return (
            set(schema["required"]) <= set(value) <= set(known)
            and list(value) == [name for name in known if name in value]
            and all(is_valid(item, known[name]) for name, item in value.items())
        )
    return True
