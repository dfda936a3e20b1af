"""How much a verb says: ``-q`` for errors and the answer alone, ``-v`` for details and the kit's log on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from adalink.runtime.logs import ROOT
from adalink.tools.terminal.terminal_text import echo

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# Of the process, since progress comes from threads too.
_level = 0


def is_quiet() -> bool:
    """Whether the running verb has ``-q``."""
    return _level < 0


def is_verbose() -> bool:
    """Whether the running verb has ``-v``."""
    return _level > 0


def say(message: str) -> None:
    """Print one line of progress, or a note, on stderr; nothing with ``-q``."""
    if not is_quiet():
        echo(message, err=True)


@contextmanager
def verbosity(level: int) -> Iterator[None]:
    """Say less or more until the block ends.

    Args:
        level: -1 for errors and answers alone, 0 for progress and hints too, 1 for details and the log's events
            (``INFO``), 2 and more for caches too (``DEBUG``).
    """
    global _level
    before, _level = _level, level
    try:
        with log_to_stderr(level):
            yield
    finally:
        _level = before


@contextmanager
def log_to_stderr(level: int) -> Iterator[None]:
    """Show the log on stderr until the block ends, from level 1 on; see ``verbosity``."""
    if level < 1:
        yield
        return
    logger, handler = logging.getLogger(ROOT), _StderrHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    before = logger.level
    logger.setLevel(logging.INFO if level == 1 else logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def warnings_to_stderr() -> Iterator[None]:
    """Show warnings and errors of the log on stderr until the block ends, where ``--verbose`` does not show all."""
    logger, handler = logging.getLogger(ROOT), _StderrHandler(logging.WARNING)
    handler.setFormatter(logging.Formatter(_FORMAT))
    if any(isinstance(other, _StderrHandler) for other in logger.handlers):
        yield
        return
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; see ``logging.Handler``."""
        try:
            echo(self.format(record), err=True)
        except Exception:  # a log that cannot be written stops no work
            self.handleError(record)
