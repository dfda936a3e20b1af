"""``adalink completion``: a script that lets a shell complete commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo

_VARIABLE = "_ADALINK_COMPLETE"
_HOW = {
    "bash": 'eval "$(adalink completion bash)"  # in ~/.bashrc',
    "zsh": 'eval "$(adalink completion zsh)"  # in ~/.zshrc, behind compinit',
    "fish": "adalink completion fish > ~/.config/fish/completions/adalink.fish",
}


@click.command(cls=Verb, short_help="Print a script that completes commands in a shell.")
@click.argument("shell", type=click.Choice(list(_HOW)))
def command(shell: str) -> None:
    """Print a script that completes commands in SHELL: verbs, options, files, tasks, backends and variants.

    Tasks and variants are those of the deployment that is typed already.

    \b
    Example:
      eval "$(adalink completion bash)"  # in ~/.bashrc
      eval "$(adalink completion zsh)"   # in ~/.zshrc, behind compinit
      adalink completion fish > ~/.config/fish/completions/adalink.fish
    """  # noqa: D301
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    completion = kind(root, {}, "adalink", _VARIABLE)
    # Not `source`, which runs bash to learn its version.
    echo(f"# {_HOW[shell]}\n{completion.source_template % completion.source_vars()}")
