"""What to do after Ctrl-C in a training: where it stands, and the command that goes on."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from adalink.tools.command_line.verb import typed_words
from adalink.tools.terminal.step_line import StepLine
from adalink.tools.terminal.terminal_text import echo
from adalink.training.run_folder import checkpoints_of

_INTERRUPTED = 130
_TOKEN = "--token"
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


def command_again(option: str) -> str:
    """The running command as it was typed, with one more option, for a shell; a token is left out."""
    words = [word for word in typed_words(click.get_current_context()) if word != option]
    for place, word in reversed(list(enumerate(words))):
        if word == _TOKEN or word.startswith(f"{_TOKEN}="):
            del words[place : place + (2 if word == _TOKEN else 1)]
    return shlex.join(["adalink", *words, option])
