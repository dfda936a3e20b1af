"""A quick start on its way: steps that are done are left out, the others are run and recorded."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import click

from adalink.tools.quickstart.state import State
from adalink.tools.quickstart.steps import Step

# Runs a command of ``adalink``; returns its exit code and what it printed.
Call = Callable[[Sequence[str]], tuple[int, str]]


class Done(NamedTuple):
    """A step that is done: its command, and its seconds; ``None`` if it had been done before."""

    command: str
    seconds: float | None


def run_steps(
    steps: Sequence[Step], state: State, call: Call, say: Callable[[str], None], before: Sequence[str] = ()
) -> list[Done]:
    """Do the steps in their order.

    Args:
        steps: the steps.
        state: what was done before, and is recorded.
        call: runs a command.
        say: called with lines for people.
        before: options of ``adalink`` itself, for each command.

    Raises:
        click.exceptions.Exit: a command failed; with its exit code.
        click.ClickException: a command refused what it was given.
    """
    done = []
    for number, step in enumerate(steps, start=1):
        command = shlex.join(("adalink", *before, *step.command))
        if state.is_done(step):
            say(f"[{number}/{len(steps)}] done before: {command}")
            done.append(Done(command, None))
            continue
        say(f"[{number}/{len(steps)}] {command}")
        start = time.monotonic()
        try:
            code, output = call([*before, *step.command, *step.extra()])
        except click.ClickException:
            say(_goes_on(number))
            raise
        if code:
            say(f"{output}{_goes_on(number)}")
            raise click.exceptions.Exit(code)
        seconds = round(time.monotonic() - start, 1)
        state.add(step)
        said = next(iter(output.splitlines()), "").strip()
        say(f"  {seconds} s: {said}")
        done.append(Done(command, seconds))
    return done


def _goes_on(number: int) -> str:
    return f"step {number} failed: the same quickstart goes on there, once its cause is mended"
