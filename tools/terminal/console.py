"""Tables and lists on stdout, progress on stderr: the same for every verb, and as wide as the terminal."""

from __future__ import annotations

import errno
import os
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeGuard

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from adalink.tools.terminal.terminal_text import echo, printable
from adalink.tools.terminal.verbose import is_quiet
from adalink.tools.terminal.verbose import say as say

_PIPE_WIDTH = 160


class _Console(Console):
    """A console that leaves a closed pipe to the command's boundary; rich itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich, which has caught the error."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, err: bool = False) -> None:
    """Print a table for people; texts are shown as they are, without markup."""
    table = Table(title=Text(printable(title)), title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(cell)), style=_style(cell)) for cell in row))
    console = _Console(stderr=err)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = _Console(stderr=err, width=_PIPE_WIDTH)
    console.print(table)


def line_width() -> int:
    """Columns of a line for people: as many as the terminal has or ``COLUMNS`` says, else 80; 40 to 120."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, 120))


def print_marked(mark: str, text: str) -> None:
    """Print a line that begins with ``pass``, ``FAIL``, ``works`` or ``no``, coloured on a terminal."""
    line = Text.assemble((printable(mark), _style(mark)), printable(text))
    _Console().print(line, soft_wrap=True)


def print_wrapped(text: str, *, indent: int = 0) -> None:
    """Print a text in lines that fit; words, such as digests, stay whole."""
    margin = " " * indent
    lines = textwrap.wrap(
        text, line_width(), initial_indent=margin, subsequent_indent=margin, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    for line in lines:
        echo(line)


def print_fields(fields: Mapping[str, object], *, indent: int = 0) -> None:
    """Print names and values; entries of a mapping are indented below its name, and values are aligned.

    Empty values are shown as ``none``, and a value that does not fit goes below its name.
    """
    widest = max((len(name) for name, value in fields.items() if not _is_nested(value)), default=0)
    for name, value in fields.items():
        if _is_nested(value):
            echo(f"{' ' * indent}{name}")
            print_fields(value, indent=indent + 2)
            continue
        line = f"{' ' * indent}{name:<{widest}}  {_shown(value)}"
        if len(line) <= line_width():
            echo(line)
        else:
            echo(f"{' ' * indent}{name}")
            print_wrapped(_shown(value), indent=indent + 2)


def _is_nested(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping) and bool(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "none" if value in (None, "", {}) else str(value)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on stderr until the block ends; where stderr is no terminal, a line for each new job instead.

    With ``-q`` nothing.

    What it gives is called with ``"job: detail"`` and how far that is from 0 to 1, ``None`` where nobody knows.
    """
    console = Console(stderr=True)
    if is_quiet():
        yield lambda line, done: None
        return
    if not console.is_terminal:
        last = ""

        def say_job(line: str, done: float | None) -> None:
            nonlocal last
            job = line.partition(":")[0]
            if job != last:
                say(job)
            last = job

        yield say_job
        return
    columns = (TimeElapsedColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task("", total=None)

        def show(line: str, done: float | None) -> None:
            bar.update(shown, description=printable(line), completed=done or 0.0, total=None if done is None else 1.0)

        yield show


def _style(cell: object) -> str:
    return {"pass": "green", "works": "green", "FAIL": "bold red", "no": "yellow"}.get(str(cell), "")
