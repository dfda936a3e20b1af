"""``docs/reference/cli.md``: the help of every verb, as the verbs give it.

``python -m adalink.tools.command_line.help_page docs/reference/cli.md`` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from adalink.tools.cli import main

_WIDTH = 100
_INTRODUCTION = """# Command line

This page is generated from the commands: `python -m adalink.tools.command_line.help_page docs/reference/cli.md`.
A test compares the two.

Results go to stdout, progress to stderr. [Exit codes](errors.md#exit-codes) say how a command ended.
"""


def render() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for path, command in _walk((), main):
        context = _context(path, command)
        title = " ".join(("adalink", *path))
        parts.append(f"## {title}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


def _walk(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(_context(path, command)):
            verb = command.get_command(_context(path, command), name)
            assert verb is not None
            yield from _walk((*path, name), verb)


def _context(path: tuple[str, ...], command: click.Command) -> click.Context:
    if hasattr(command, "_help_option"):
        command._help_option = None  # click keeps the one of the first context, which may have had other names
    return click.Context(
        command,
        info_name=" ".join(("adalink", *path)),
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        help_option_names=["-h", "--help"],
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
