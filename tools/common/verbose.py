"""``adalink --verbose``: the kit's log on stderr while a verb runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from adalink.tools.common.terminal_text import echo

_ROOT = "adalink"  # adalink.runtime.logs.ROOT, whose package would bring numpy along
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def log_to_stderr(verbosity: int) -> Iterator[None]:
    """Show the log on stderr until the block ends.

    Args:
        verbosity: 0 for nothing, 1 for events (``INFO``), 2 and more for caches too (``DEBUG``).
    """
    if verbosity < 1:
        yield
        return
    logger, handler = logging.getLogger(_ROOT), _StderrHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    level = logger.level
    logger.setLevel(logging.INFO if verbosity == 1 else logging.DEBUG)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def warnings_to_stderr() -> Iterator[None]:
    """Show warnings and errors of the log on stderr until the block ends, where ``--verbose`` does not show all."""
    logger, handler = logging.getLogger(_ROOT), _StderrHandler(logging.WARNING)
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
