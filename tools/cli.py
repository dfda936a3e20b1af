"""The ``adalink`` command: verbs imported when they run, and the one boundary where errors become exit codes."""

from __future__ import annotations

import importlib

import click
from click.shell_completion import CompletionItem

from adalink.tools.command_line.error_boundary import BoundaryGroup, UserError
from adalink.tools.command_line.verb import VerbGroup

# What a user wants to do -> its verbs, each with its one-line summary, so that `adalink --help` imports none of them.
# A test compares them with the verbs' own.
SECTIONS = {
    "Begin": {
        "quickstart": "From rows and a model to a measured task, in one command.",
    },
    "Make": {
        "split": "Divide rows into those to learn from and those to test with.",
        "train": "Train an adapter on rows of prompts, or of texts with labels.",
        "compress": "Make an adapter smaller, and measure what that loses.",
        "export": "Export a base model, adapters and engines into a deployment.",
        "remove": "Remove a task, a graph or an engine from a deployment.",
    },
    "Run": {
        "run": "Generate text, or hidden states, with a deployment.",
        "embed": "Embed texts with an encoder, as sentence-transformers does.",
        "classify": "Classify texts by tasks that were trained with labels.",
        "chat": "Chat with a deployment in the terminal.",
    },
    "Serve": {
        "serve": "Serve a deployment behind OpenAI's API, every task a model.",
    },
    "Check": {
        "eval": "Measure tasks on rows that say what is right.",
        "verify": "Prove that a deployment computes what PyTorch computes.",
        "bench": "Measure what a task costs beside the base model.",
        "inspect": "Explain a deployment, adapter, model, ONNX file or engine.",
        "doctor": "Say which backends work on this machine.",
    },
    "Set up": {
        "config": "Show which defaults of options are set, and where.",
        "completion": "Print a script that completes commands in a shell.",
    },
}
VERBS = {verb: summary for section in SECTIONS.values() for verb, summary in section.items()}

# Verbs of 0.1.0 that are no part of the package any more -> what to run in a checkout instead.
_MOVED = {"study": "python -m studies run", "demo": "make demo"}


class LazyGroup(BoundaryGroup, VerbGroup):
    """A group whose verbs live in ``adalink.tools.commands.<verb>:command`` and are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs, in the order in which one uses them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb; ``None`` when there is none of that name."""
        if cmd_name in _MOVED:
            raise UserError(
                f"'adalink {cmd_name}' is no part of the package since 0.2.0: in a checkout, {_MOVED[cmd_name]}"
            )
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"adalink.tools.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs by what they are for, without importing them."""
        widest = max(map(len, VERBS))
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(verb.ljust(widest), summary) for verb, summary in verbs.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer verbs without importing them, and options."""
        verbs = [CompletionItem(verb, help=summary) for verb, summary in VERBS.items() if verb.startswith(incomplete)]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]


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
