"""The one boundary where errors become exit codes: for ``adalink``, the demo and the studies."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from adalink.runtime.extras import install_command
from adalink.tools.terminal.terminal_text import printable

# Package that a command may find missing -> the extra that brings it.
_EXTRAS = {
    "accelerate": "train",
    "gguf": "export",
    "PIL": "vision",
    "onnx": "export",
    "onnxruntime": "cpu",
    "matplotlib": "study",
    "ml_dtypes": "export",
    "optimum": "export",
    "peft": "study",
    "prometheus_client": "serve",
    "sklearn": "eval",
    "starlette": "serve",
    "torch": "export",
    "transformers": "export",
    "uvicorn": "serve",
}
# Verb -> the extra that brings all it needs.
_EXTRA_OF_VERB = {"quickstart": "cpu,eval,export,train", "train": "train", "verify": "cpu,export,train"}
# Modules of the kit and of its checkout: a missing one is a bug.
_OURS = ("adalink", "benchmarks", "examples", "studies")

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIPE_CLOSED = 141  # what a shell gives a program that SIGPIPE ended


class UserError(click.ClickException):
    """An error of the user's making: its message alone is shown, and the exit code is 2."""

    exit_code = 2

    def format_message(self) -> str:
        """The message as a terminal may show it."""
        return printable(self.message)


class BoundaryGroup(click.Group):
    """A group of commands behind ``error_boundary``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. A user error becomes its message and exit code 2; a bug keeps its traceback."""
        with error_boundary(ctx):
            return super().invoke(ctx)


class BoundaryCommand(click.Command):
    """A single command behind ``error_boundary``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. A user error becomes its message and exit code 2; a bug keeps its traceback."""
        with error_boundary(ctx):
            return super().invoke(ctx)


@contextlib.contextmanager
def error_boundary(ctx: click.Context) -> Iterator[None]:
    """Turn what a command raises into a message and an exit code.

    Args:
        ctx: the context of the command; names it where a package is missing.

    Raises:
        UserError: an error of the kit, a missing package or a full disk; exit code 2.
        click.exceptions.Exit: an interrupt (130), or nobody reads the output any more (141).
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", *_OURS, *sys.stdlib_module_names):
            raise
        verb = ctx.invoked_subcommand or ctx.info_name or ""
        extra = _EXTRA_OF_VERB.get(verb, _EXTRAS.get(package, "cpu,export,train"))
        raise UserError(
            f"'{verb}' needs the package {package}, which is not installed: {install_command(extra)}"
        ) from error
    except click.UsageError as error:  # it quotes what the command line says
        raise click.UsageError(printable(error.format_message()), error.ctx) from error
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        ctx.exit(130)
    except OSError as error:
        if error.errno == errno.EPIPE:  # of no interest to whoever has stopped reading
            _drop_output()
            ctx.exit(_PIPE_CLOSED)
        if error.errno in _DISK_FULL:
            _drop_output()
            raise UserError(f"cannot write: {error.strerror}; free space, and run the command again") from error
        raise
    except Exception as error:
        from adalink.runtime.errors import AdaLinkError  # here, because it brings numpy along

        if isinstance(error, AdaLinkError):
            raise UserError(str(error)) from error
        raise


def _drop_output() -> None:
    """Discard the rest of the output, which Python would try to write once more at exit."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            output = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
