"""``adalink quickstart``: from rows and a model to a deployment with a measured task, in one command."""

from __future__ import annotations

import contextlib
import io
import shlex
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import ConfigError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.runtime.storage.decoding import decode_json
from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import as_a_step, say_next
from adalink.tools.command_line.options import make_options, map_option, out_option, template_option
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import Verb, config_path, words_for_steps
from adalink.tools.terminal.console import say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from adalink.training.models.hub_access import HubAccess

_LARGEST_SEED = (1 << 32) - 1
# What the steps need beside the runtime, the extra `cpu,eval,export,train`.
_PACKAGES = ("onnxruntime", "torch", "transformers", "accelerate", "onnx", "optimum", "sklearn")


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Options of ``adalink quickstart``, by the names of its parameters; see ``--help``."""

    model: str
    rows: Path
    out: Path
    task: str | None
    columns: tuple[str, ...]
    template: str | None
    rank: int | None
    max_steps: int | None
    seed: int
    access: HubAccess
    output: JsonOutput


@click.command(cls=Verb, short_help="From rows and a model to a measured task, in one command.")
@click.argument("model", shell_complete=complete_files)
@click.argument("rows", metavar="ROWS", type=click.Path(path_type=Path))
@out_option("Folder for all of it.")
@click.option("-t", "--task", metavar="NAME", help="Name of the task; that of the file ROWS by default.")
@map_option
@template_option
@click.option("--rank", type=click.IntRange(min=0), help="Width of the bottleneck; that of `adalink train` by default.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Optimizer steps; those of `adalink train` by default.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, _LARGEST_SEED), help="Of the split and the training."
)
@hub_options
@json_options("Print the result as JSON.")
def command(**values: Any) -> None:
    """Train, deploy, verify and evaluate a task on MODEL from ROWS.

    MODEL is a Hugging Face folder, a GGUF file or a hub id. On an encoder, ROWS has the columns text and label. On a
    decoder it has prompt and completion, or text and label: --template says how a prompt is made of them.

    Six steps follow each other: export base, split, train, export adapter, verify, eval. Each is shown as the command
    that repeats it. A step that is done is not done again, also after Ctrl-C. With other ROWS and the same OUT a
    further task joins the deployment, and the base is not exported again.

    \b
    Example:
      adalink quickstart ./MiniLM news.csv --map text=body,label=topic --out ./news
      adalink quickstart ./SmolLM2 news.csv --template "Text: {text} Topic:" --out ./news
    """  # noqa: D301
    start(make_options(QuickstartOptions, values))


def start(options: QuickstartOptions) -> None:
    """Do the steps, and print the verdict on stdout.

    Raises:
        AdaLinkError: rows, model or folder cannot be used.
        click.exceptions.Exit: a step failed; with its exit code.
    """
    from adalink.export.base.request import check_model
    from adalink.runtime.storage.atomic import make_folder
    from adalink.tools.preflight.training import check_training
    from adalink.tools.quickstart.run import run_steps
    from adalink.tools.quickstart.state import State
    from adalink.tools.quickstart.steps import Places, choose_template, make_steps, name_task
    from adalink.training.models.hub_access import hub_access

    _check_packages()
    places = Places(options.out, name_task(options.task, options.rows))
    state = State(options.out, _defaults())
    source = RowSource(options.rows, read_columns(options.columns), options.template)
    chosen = {"--rank": options.rank, "--max-steps": options.max_steps}
    training = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
    with hub_access(options.model, options.access):
        source = replace(source, template=choose_template(options.model, source))
        check_training(options.model, source, None, places.adapter, resume=True)
        check_model(options.model, places.deployment)
        revision = options.access.revision
        steps = make_steps(options.model, source, places, seed=options.seed, revision=revision, training=training)
        if rows := state.rows_of(steps[1]):
            raise ConfigError(
                f"task {places.task!r} in {options.out} was made of {Path(rows).name}, not of {options.rows}: give "
                "another name with --task"
            )
        make_folder(options.out, repair="choose a writable --out")
        done = run_steps(steps, state, _call, say, words_for_steps(click.get_current_context()))
    report = decode_json(places.evaluation.read_bytes(), dict[str, Any])
    verb = "run" if report["tasks"][0]["kind"] == "text" else "classify"
    parts = string.Formatter().parse(source.template or "{text}")
    text = "".join(literal + (column or "").upper() for literal, column, _, _ in parts)
    following = (verb, str(places.deployment), text, "--task", places.task)
    result = {
        "verdict": report["verdict"],
        "deployment": str(places.deployment),
        "task": places.task,
        "page": str(places.page),
        "evaluation": report,
        "steps": [one._asdict() for one in done],
        "next": shlex.join(("adalink", *following)),
    }

    def show() -> None:
        echo(report["verdict"])
        echo(f"page: {places.page}")

    options.output.give(result, show)
    say_next(*following, output=options.output)


def _call(words: Sequence[str]) -> tuple[int, str]:
    """Run a command of this program; returns its exit code and what it printed on stdout."""
    program, output = click.get_current_context().find_root().command, io.StringIO()
    with contextlib.redirect_stdout(output), as_a_step():
        code = program.main(list(words), prog_name="adalink", standalone_mode=False)
    return code or 0, output.getvalue()


def _defaults() -> dict[str, dict[str, Any]]:
    """What the environment and the configuration file say, by verb and option."""
    from adalink.tools.commands.config import find_settings

    ctx, defaults = click.get_current_context(), dict[str, dict[str, Any]]()
    for one in find_settings(ctx.find_root(), config_path(ctx))[1]:
        if one.is_used:
            defaults.setdefault(one.verb, {})[one.option] = one.value
    return defaults


def _check_packages() -> None:
    """Find a missing package before minutes of work, not after them; raises ``ModuleNotFoundError``."""
    if missing := next((name for name in _PACKAGES if find_spec(name) is None), None):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
