"""``adalink remove``: a task leaves a deployment, and nothing else in it is touched."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="remove", short_help="Remove a task from a deployment.")
@click.argument("deployment", type=click.Path(path_type=Path))
@click.argument("task")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(deployment: Path, task: str, as_json: bool) -> None:
    """Remove TASK from DEPLOYMENT.

    No byte under base/ or engines/ is touched. A deployment that is open goes on with the tasks it has loaded.

    \b
    Example:
      adalink remove ./deployment topics
    """  # noqa: D301
    from adalink.export.writer import remove_task

    left = sorted(remove_task(deployment, task).tasks)
    if as_json:
        click.echo(json.dumps({"deployment": str(deployment), "removed": task, "tasks": left}, indent=2))
        return
    click.echo(f"task {task} is removed from {deployment}; left: {', '.join(left) or 'none'}")
