"""Classes of outcome of one input, and how results are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# What may happen: a typed error, the result of the whole input, or a result of its own where nothing vouches for the
# input (no digest covers it, or it was sealed again), which must then be well-formed.
GOOD = ("typed", "same", "accepted")
# What may not: another exception; a file accepted that is not the one of its digest; a result that is not well-formed;
# the end of the process; no answer.
BAD = ("untyped", "altered", "malformed", "crash", "hang")


class Outcome(NamedTuple):
    """Class of an outcome, and what happened: for an error its type and message, with the line that raised it."""

    kind: str
    detail: str = ""


class MalformedError(AssertionError):
    """A result that no right input has: not finite, or of another shape."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise MalformedError(message)


def digest(value: Any) -> str:
    """Digest of a result: nested tuples, lists and dictionaries of arrays, numbers and texts."""
    state = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, np.ndarray):
            require(part.dtype.kind != "f" or np.isfinite(part).all(), "a result is not finite")
            state.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                state.update(str(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            state.update(f"{len(part)}:".encode())
            for each in part:
                add(each)
        else:
            state.update(repr(part).encode("utf-8", "backslashreplace"))

    add(value)
    return state.hexdigest()


def observe(call: Callable[[], Any], expected: str | None, *, is_vouched: bool = False) -> Outcome:
    """Call the kit and class what happens.

    Args:
        call: returns a result; its digest is compared.
        expected: digest of the whole input's result; ``None`` where there is none.
        is_vouched: whether a digest says what the input must be: then any result but an error is ``altered``.
    """
    from adalink.runtime.errors import AdaLinkError

    try:
        found = digest(call())
    except AdaLinkError as error:
        message = str(error)
        if not message.strip():
            return Outcome("untyped", f"{type(error).__name__} without a message")
        return Outcome("typed", f"{type(error).__name__}: {message[:200]}")
    except MalformedError as error:
        return Outcome("malformed", str(error))
    except BaseException as error:  # also SystemExit, and panics of Rust, which are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return Outcome("untyped", describe(error))
    if is_vouched:
        return Outcome("altered", "accepted, though it is not the file of its digest")
    return Outcome("same" if found == expected else "accepted")


def describe(error: BaseException) -> str:
    """Type, message and place of an exception: the last lines of the kit and of what raised it."""
    trace, places = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{'/'.join(code.co_filename.split('/')[-3:])}:{trace.tb_lineno}")
        trace = trace.tb_next
    own = [place for place in places if "fuzz/" not in place]
    return f"{type(error).__module__}.{type(error).__name__}: {str(error)[:200]} [{' '.join(own[-4:])}]"
