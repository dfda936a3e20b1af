"""Tables on stdout and progress on stderr, the same for every verb."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 160


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, err: bool = False) -> None:
    """Print a table for people; texts are shown as they are, without markup."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell), style=_style(cell)) for cell in row))
    console = Console(stderr=err)
    if not console.is_terminal:
        console = Console(stderr=err, width=_PIPE_WIDTH)
    console.print(table)


def say(message: str) -> None:
    """Print one line of progress on stderr."""
    click.echo(message, err=True)


def _style(cell: object) -> str:
    return {"pass": "green", "works": "green", "FAIL": "bold red", "no": "yellow"}.get(str(cell), "")
