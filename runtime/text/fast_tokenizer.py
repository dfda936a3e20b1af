"""Calls of the package tokenizers, whose failures become errors of the kit.

The package is written in Rust. Where it fails without expecting to, it raises a ``PanicException``, which Python does
not count among its exceptions: ``except Exception`` lets it through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adalink.runtime.errors import AdaLinkError


@contextmanager
def tokenizer_errors(kind: type[AdaLinkError], message: str) -> Iterator[None]:
    """Raise what the package raises inside as an error of the kit.

    Args:
        kind: the error's class.
        message: the object and the repair; the package's own words follow.
    """
    try:
        yield
    except AdaLinkError:
        raise
    except Exception as error:  # the package raises nothing narrower
        raise kind(f"{message}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message}: the package tokenizers failed inside: {error}") from error
