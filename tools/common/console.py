"""Tables on stdout and progress on stderr, the same for every verb."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from adalink.tools.common.terminal_text import echo, printable

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
    if not console.is_terminal:
        console = _Console(stderr=err, width=_PIPE_WIDTH)
    console.print(table)


def say(message: str) -> None:
    """Print one line of progress on stderr."""
    echo(message, err=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float | None], None]]:
    """A bar on stderr until the block ends; where stderr is no terminal, a line for each new job instead.

    What it gives is called with ``"job: detail"`` and how far that is from 0 to 1, ``None`` where nobody knows.
    """
    console = Console(stderr=True)
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
