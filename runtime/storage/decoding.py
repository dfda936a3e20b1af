"""JSON and TOML decoded into a type: whatever is wrong with a text is one exception, ``msgspec.DecodeError``.

The decoders themselves raise others too: for bytes that are not UTF-8, for thousands of brackets, for numbers of
thousands of digits. No other module of the kit decodes the JSON or TOML of a file.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time
from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode_json(text: bytes | str, kind: type[T]) -> T:
    """Decode JSON.

    Args:
        text: one JSON value.
        kind: the type that it must have; ``dict[str, Any]`` for any object.

    Raises:
        msgspec.DecodeError: it is no JSON; its subclass ``msgspec.ValidationError`` if it is JSON of another type, with
            the path of the wrong field. Both are ``ValueError``.
    """
    return _decode(lambda: msgspec.json.decode(text, type=kind))


def decode_toml(text: bytes | str, kind: type[T]) -> T:
    """Decode TOML; arguments and errors are those of ``decode_json``.

    Raises:
        ImportError: Python 3.10 has no parser of TOML, and ``tomli`` is not installed.
    """

    def decode() -> T:
        values = msgspec.toml.decode(text)
        _check_integers(values)
        return msgspec.convert(values, kind, builtin_types=(datetime, date, time), str_keys=True)

    return _decode(decode)


def _check_integers(values: object) -> None:
    """Refuse integers of more than 64 bits, which JSON refuses too; Python reads hexadecimal ones of any length."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise msgspec.DecodeError("it holds an integer of more than 64 bits")


def _decode(decode: Callable[[], T]) -> T:
    try:
        return decode()
    except msgspec.DecodeError:
        raise
    except RecursionError as error:
        raise msgspec.DecodeError("its values are nested too deeply") from error
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise msgspec.DecodeError(f"byte or character {error.start} is not UTF-8") from error
    except ValueError as error:  # Python converts no number of thousands of digits
        raise msgspec.DecodeError(f"it holds a number that cannot be read: {error}") from error
