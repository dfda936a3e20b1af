"""``adalink verify``: prove that a deployment computes what PyTorch computes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import DataError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    assume_pretokenizer_option,
    deployment_argument,
    engine_options,
    make_options,
    map_option,
    require_rows,
    template_option,
)
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import Verb

if TYPE_CHECKING:
    from adalink.training.models.hub_access import HubAccess


@dataclass(frozen=True, kw_only=True)
class VerifyCommand:
    """Options of ``adalink verify``, by the names of its parameters; see ``--help``."""

    deployment: Path
    against: str
    adapters: tuple[str, ...]
    backend: str
    variant: str | None
    threads: int | None
    quick: bool
    text_file: Path | None
    max_perplexity_increase: float | None
    task_rows: tuple[str, ...]
    columns: tuple[str, ...]
    template: str | None
    assume_pretokenizer: str | None
    access: HubAccess
    output: JsonOutput


@click.command(cls=Verb, short_help="Prove that a deployment computes what PyTorch computes.")
@deployment_argument
@click.option(
    "-m",
    "--against",
    required=True,
    metavar="MODEL",
    shell_complete=complete_files,
    help="The base model: a folder, a GGUF file or a hub id.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Compare task NAME with this adapter folder instead of the copy in the deployment. May be repeated.",
)
@engine_options
@click.option("--quick", is_flag=True, help="Fewer prompts; every kind of check is still made.")
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measure the cost of quantising on the first 4,096 tokens of this text; the built-in prompts without it.",
)
@click.option(
    "--max-perplexity-increase",
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    help="Fail if quantising raises perplexity by more; it is only reported without this.",
)
@click.option(
    "--rows",
    "task_rows",
    multiple=True,
    metavar="NAME=FILE",
    help="Rows as for 'adalink train': exact match of task NAME before and after quantising. May be repeated.",
)
@map_option
@template_option
@assume_pretokenizer_option
@hub_options
@json_options("Print the report as JSON.")
def command(**values: Any) -> None:
    """Prove that the deployment in DIR computes what PyTorch computes from MODEL.

    Every task graph is compared with float64 over the whole vocabulary, and the engine's outputs and greedy generation
    with PyTorch float32. Switching tasks is compared with fresh processes, bit for bit. A receipt shows that nothing
    was rebuilt. Limits are derived (docs/concepts/parity.md), not chosen. A quantised engine is compared with PyTorch
    running the engine's weights, dequantised; a separate table shows the cost of quantising.

    The verdict comes first and last, with a line for each check between. -v adds what each check found, and the
    receipt.

    Exit codes: 0 all checks passed, 1 a check failed, 2 it could not be measured.

    \b
    Example:
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --quick --json-file parity.json
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --variant int4 --text book.txt
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --variant int4 --rows topics=test.jsonl
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --adapter topics=./adapters/topics
    """  # noqa: D301
    arguments = make_options(VerifyCommand, values)
    if not verify_deployment(arguments):
        say_next("inspect", arguments.deployment, output=arguments.output)
        raise click.exceptions.Exit(1)
    say_next("bench", arguments.deployment, "--variant", arguments.variant, output=arguments.output)


def verify_deployment(arguments: VerifyCommand) -> bool:
    """Verify, print the checks and write the report; returns whether all passed."""
    from adalink.tools.common.environment import describe_environment
    from adalink.tools.parity.suite import VerifyOptions, verify
    from adalink.tools.parity.terminal import print_report
    from adalink.tools.preflight.deployment import check_deployment
    from adalink.tools.terminal.console import say
    from adalink.tools.terminal.quiet import quiet_libraries
    from adalink.training.models.hub_access import hub_access
    from adalink.training.models.source import find_source

    started = time.monotonic()
    adapters = _parse_pairs(arguments.adapters, "--adapter", "NAME=FOLDER")
    task_rows = _parse_pairs(arguments.task_rows, "--rows", "NAME=FILE")
    require_rows(bool(task_rows), "columns", "template")
    columns = read_columns(arguments.columns)
    check_deployment(
        arguments.deployment, (*adapters, *task_rows), backend=arguments.backend, variant=arguments.variant
    )
    options = VerifyOptions(
        backend=arguments.backend,
        variant=arguments.variant,
        threads=arguments.threads,
        quick=arguments.quick,
        text=None if arguments.text_file is None else _read_text(arguments.text_file),
        max_perplexity_increase=arguments.max_perplexity_increase,
        task_rows={name: RowSource(path, columns, arguments.template) for name, path in task_rows.items()},
        assume_pretokenizer=arguments.assume_pretokenizer,
    )
    with hub_access(arguments.against, arguments.access):
        find_source(arguments.against)
        with quiet_libraries():
            report = verify(
                arguments.deployment,
                arguments.against,
                adapters,
                options,
                progress=lambda line: say(f"[{time.monotonic() - started:5.1f} s] {line}"),
            )
    environment = {
        **describe_environment(),
        "backend": arguments.backend,
        "variant": arguments.variant,
        "threads": arguments.threads,
        "against": Path(arguments.against).name,
    }
    arguments.output.give(report.as_json(environment), lambda: print_report(report))
    return report.passed


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{path} holds no text, expected some to measure perplexity on")
    return text


def _parse_pairs(pairs: tuple[str, ...], option: str, form: str) -> dict[str, Path]:
    paths = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise click.BadParameter(f"{pair!r} is not {form}", param_hint=option)
        if name in paths:
            raise click.BadParameter(f"{name!r} is named twice, expected each once", param_hint=option)
        paths[name] = Path(path)
    return paths
