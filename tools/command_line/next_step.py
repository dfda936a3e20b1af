"""The last line of a verb: the command that usually comes next, whole."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from adalink.tools.command_line.json_output import JsonOutput
from adalink.tools.terminal.terminal_text import echo
from adalink.tools.terminal.verbose import is_quiet

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Base

# A text to try a deployment with.
SAMPLE_TEXT = "Oil prices rose again."
_is_a_step: ContextVar[bool] = ContextVar("adalink_is_a_step", default=False)


@contextmanager
def as_a_step() -> Iterator[None]:
    """Verbs in the block are steps of another, which says itself what comes next."""
    before = _is_a_step.set(True)
    try:
        yield
    finally:
        _is_a_step.reset(before)


def say_next(*words: object, output: JsonOutput | None = None) -> None:
    """Print ``next: adalink ...`` on stderr, to be copied; nothing with ``-q`` or ``--json``.

    Args:
        words: what comes behind ``adalink``; ``None`` for an option that was not given, which leaves out its name too.
        output: whether the answer was JSON.
    """
    if is_quiet() or _is_a_step.get() or (output is not None and output.on_stdout):
        return
    echo(f"next: adalink {shlex.join(_given(words))}", err=True)


def verb_for_texts(base: Base) -> str:
    """The verb that answers texts without labels: ``embed`` only for an encoder that says how its states are pooled."""
    return "embed" if base.pooling is not None and base.pooling.modes else "run"


def _given(words: tuple[object, ...]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if word is None:
            kept.pop()
        else:
            kept.append(str(word))
    return kept
