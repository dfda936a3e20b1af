"""Types of arguments: a wrong one is a ``RequestError`` that names the argument, never a traceback."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path
from typing import Any

from adalink.runtime.errors import RequestError


def check_whole(value: Any, name: str, least: int) -> None:
    """Check a whole number; raises ``RequestError``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise RequestError(f"{name} is {value!r:.80}, expected a whole number of at least {least}")


def check_path(value: Any, name: str) -> Path:
    """A path of a file or folder; raises ``RequestError``."""
    raw = value.__fspath__() if isinstance(value, os.PathLike) else value
    if not isinstance(raw, str) or "\0" in raw or not _can_be_encoded(raw):
        raise RequestError(f"{name} is {value!r:.80}, expected a path: a text or a pathlib.Path")
    return Path(raw)


def _can_be_encoded(path: str) -> bool:
    """Whether the system can take a path: half a character has no bytes."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def check_name(value: Any, name: str) -> str:
    """A name; raises ``RequestError``."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is {value!r:.80}, expected a name, which is a text")
    return value


def check_flag(value: Any, name: str) -> None:
    """Check a setting that is on or off; raises ``RequestError``."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r:.80}, expected True or False")


def check_kind(value: Any, name: str, kind: Any, expected: str) -> None:
    """Check that a value is ``None`` or of a class; raises ``RequestError``."""
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"{name} is {value!r:.80}, expected {expected}")
