"""What the commands print for people: the runs that are left, and the tables of a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from adalink.tools.terminal.console import print_table, say
from studies.report.table import accuracy_rows, comparison_rows, not_compared_line, shared_rows


def print_open_runs(study_name: str, runs: Sequence[Mapping[str, Any]], minutes: float | None, jobs: int) -> None:
    """Print the runs that are left.

    Args:
        study_name: the study's name.
        runs: an entry a run with ``cell``, ``purpose``, ``lr``, ``seed``, ``steps`` and ``seconds``.
        minutes: how long all of them take; ``None`` where that is not known.
        jobs: runs at once.
    """
    print_table(
        f"{study_name}: {len(runs)} runs to do",
        ("what", "for", "learning rate", "seed", "steps", "seconds"),
        [(run["cell"], run["purpose"], _rate(run), run["seed"], run["steps"], _seconds(run)) for run in runs],
    )
    if minutes is None:
        say("how long they take is not known: of a base there is no finished run, and no seconds_per_step in the study")
    else:
        say(f"about {minutes:.0f} minutes with {jobs} at once, if a run takes no longer beside others")


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the tables of a summary."""
    print_table(summary["study"]["name"], *accuracy_rows(summary))
    if summary["comparisons"]:
        print_table("differences in accuracy, seed by seed", *comparison_rows(summary))
    if line := not_compared_line(summary):
        click.echo(line)
    if summary["shared"]:
        print_table("one for each data set, and one for all", *shared_rows(summary))


def _rate(run: Mapping[str, Any]) -> str:
    """A learning rate; that of a final run may still have to be chosen."""
    if run["lr"] is None:
        return "to be chosen" if run["steps"] else "-"
    return f"{run['lr']:g}"


def _seconds(run: Mapping[str, Any]) -> str:
    return "?" if run["seconds"] is None else f"{run['seconds']:.0f}"
