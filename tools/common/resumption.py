"""What to do after Ctrl-C in a training: where it stands, and the command that goes on."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
from click.core import ParameterSource

from adalink.tools.common.step_line import StepLine
from adalink.tools.common.terminal_text import echo
from adalink.training.run_folder import checkpoints_of

_INTERRUPTED = 130
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@contextlib.contextmanager
def resumable(out: Path, line: StepLine) -> Iterator[None]:
    """Turn an interrupt in the block into words and exit code 130.

    Args:
        out: the adapter folder, beside which the checkpoints are.
        line: the progress line, which is closed.
    """
    try:
        yield
    except KeyboardInterrupt:
        line.close()
        checkpoints = checkpoints_of(out.resolve())
        if not checkpoints.is_dir():
            echo("Interrupted before the first step: nothing was written.", err=True)
        else:
            steps = [int(match[1]) for path in checkpoints.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
            where = f"a checkpoint of step {max(steps)}" if steps else "no checkpoint yet"
            echo(f"Interrupted: {out}.checkpoints has {where}. To go on:", err=True)
            echo(f"  {command_again('--resume')}", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None
    finally:
        line.close()


def command_again(*more: str) -> str:
    """The running command as it was given, with more options, for a shell."""
    context = click.get_current_context()
    words = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        option = [] if isinstance(parameter, click.Argument) else [max(parameter.opts, key=len)]
        if isinstance(value, bool):
            words += option if value and option[0] not in more else []
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [*option, str(one)]
    return shlex.join([*context.command_path.split(), *words, *more])
