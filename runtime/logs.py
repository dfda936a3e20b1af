"""Logging: loggers below ``adalink``, silent until the application adds a handler.

``INFO`` reports events: a deployment opened, a task loaded or unloaded, images encoded, an engine built. ``DEBUG`` adds
cache hits: a digest not computed again, the cached prefix of a prompt. The decode loop logs nothing.
"""

from __future__ import annotations

import logging

ROOT = "adalink"

# Without a handler, Python would print warnings of a library to stderr by itself.
logging.getLogger(ROOT).addHandler(logging.NullHandler())


def get_logger(module: str) -> logging.Logger:
    """The logger of a module of the kit.

    Args:
        module: its ``__name__``, which begins with ``adalink.``.
    """
    return logging.getLogger(module)
