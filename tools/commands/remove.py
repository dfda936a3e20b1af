"""``adalink remove``: remove a task or a variant of the base from a deployment; all other files stay."""

from __future__ import annotations

from pathlib import Path

import click

from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import deployment_argument, variant_option
from adalink.tools.command_line.shell_completion import complete_tasks
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo


@click.command(cls=Verb, name="remove", short_help="Remove a task, a graph or an engine from a deployment.")
@deployment_argument
@click.argument("task", required=False, shell_complete=complete_tasks)
@variant_option("Remove this form of the base, such as an engine, instead of a task.")
@json_options("Print the result as JSON.")
def command(deployment: Path, task: str | None, variant: str | None, output: JsonOutput) -> None:
    """Remove TASK, or one form of the base, from the deployment DIR.

    Removing a task touches no byte under base/ or engines/; removing a graph or an engine touches no task. A deployment
    that is open goes on with what it has loaded, until it is told to reload.

    \b
    Example:
      adalink remove ./deployment topics
      adalink remove ./deployment --variant tensorrt-rtx
    """  # noqa: D301
    from adalink.export.writer import remove_task, remove_variant

    if (task is None) == (variant is None):
        raise click.UsageError("say what to remove: a task, or a form of the base with --variant")
    if task is not None:
        what, removed, left = "task", task, sorted(remove_task(deployment, task).tasks)
    else:
        assert variant is not None
        what, removed, left = "variant", variant, sorted(remove_variant(deployment, variant).variants)
    output.give(
        {"deployment": str(deployment), "removed": removed, f"{what}s": left},
        lambda: echo(f"{what} {removed} is removed from {deployment}; left: {', '.join(left) or 'none'}"),
    )
    say_next("inspect", deployment, output=output)
