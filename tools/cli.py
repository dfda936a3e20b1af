"""The ``adalink`` command: verbs imported when they run, and the one boundary where errors become exit codes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys

import click

# Verb -> its one-line summary, so that `adalink --help` imports none of them. A test compares them with the verbs' own.
VERBS = {
    "train": "Train an adapter on prompt and completion rows.",
    "study": "Compare methods of adaptation on labelled data.",
    "export": "Export a base model, adapters and engines into a deployment.",
    "remove": "Remove a task, a graph or an engine from a deployment.",
    "run": "Generate text, or hidden states, with a deployment.",
    "verify": "Prove that a deployment computes what PyTorch computes.",
    "bench": "Measure what a task costs beside the plain base.",
    "inspect": "Explain a deployment, adapter, model, ONNX file or engine.",
    "doctor": "Say which backends work on this machine.",
    "demo": "Export, run, verify and measure a real model with two tasks.",
}

# Package that a verb may find missing -> the extra that brings it.
_EXTRAS = {
    "accelerate": "train",
    "gguf": "export",
    "PIL": "vision",
    "onnx": "export",
    "onnxruntime": "cpu",
    "matplotlib": "study",
    "optimum": "export",
    "peft": "study",
    "torch": "export",
    "transformers": "export",
}

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIPE_CLOSED = 141  # what a shell gives a program that SIGPIPE ended


class UserError(click.ClickException):
    """An error of the user's making: its message alone is shown, and the exit code is 2."""

    exit_code = 2


class LazyGroup(click.Group):
    """A group whose verbs live in ``adalink.tools.<verb>:command`` and are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs, in the order in which one uses them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; ``None`` when there is none of that name."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"adalink.tools.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Run a verb. A user error becomes its message and exit code 2; a bug keeps its traceback."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            raise UserError(
                f"'{ctx.invoked_subcommand}' needs the package {package}, which is not installed: "
                f"pip install 'adalink-kit[{_EXTRAS[package]}]'"
            ) from error
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
    """Send what is left of the output nowhere: Python would try once more to write it, at the end."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            output = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="adalink-kit", prog_name="adalink")
def main() -> None:
    """Input-only adapters (AdaLink) for frozen transformers.

    Compile the base once, ship every task as a graph of some 100 kB, and prove that both compute what PyTorch
    computes. Exit codes: 0 done, 1 a check failed, 2 wrong use or bad input, 130 interrupted.

    \b
    Example:
      adalink export base ./SmolLM2-135M-Instruct --out ./deployment
      adalink export adapter ./adapters/topics --out ./deployment
      adalink run ./deployment "Text: oil prices rose again" --task topics
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct
    """  # noqa: D301
