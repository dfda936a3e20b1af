"""``adalink verify``: prove that a deployment computes what PyTorch computes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import DataError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.tools.common.options import (
    assume_pretokenizer_option,
    make_options,
    map_option,
    require_rows,
    template_option,
)
from adalink.tools.common.report_file import ReportFile, write_json
from adalink.tools.common.terminal_text import echo

if TYPE_CHECKING:
    from adalink.tools.parity.report import Report


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
    json_file: Path | None


@click.command(short_help="Prove that a deployment computes what PyTorch computes.")
@click.argument("deployment", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The base model: a folder, a GGUF file or a hub id.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Compare task NAME with this adapter folder instead of the copy in the deployment. May be repeated.",
)
@click.option("--backend", default="onnxruntime-cpu", show_default=True, help="Which engine is verified.")
@click.option("--variant", metavar="NAME", help="Which form of the base, such as int4; not a quantised one by default.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
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
@click.option("--json", "json_file", type=ReportFile(), help="Also write a JSON report.")
def command(**values: Any) -> None:
    """Prove that the deployment in DIR computes what PyTorch computes from MODEL.

    Every task graph is compared with float64 over the whole vocabulary, and the engine's outputs and greedy generation
    with PyTorch float32. Switching tasks is compared with fresh processes, bit for bit. A receipt shows that nothing
    was rebuilt. Limits are derived (docs/concepts/parity.md), not chosen. A quantised engine is compared with PyTorch
    running the engine's weights, dequantised; a separate table shows the cost of quantising.

    Exit codes: 0 all checks passed, 1 a check failed, 2 it could not be measured.

    \b
    Example:
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --quick --json parity.json
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --variant int4 --text book.txt
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --variant int4 --rows topics=test.jsonl
      adalink verify ./deployment --against ./SmolLM2-135M-Instruct --adapter topics=./adapters/topics
    """  # noqa: D301
    verify_deployment(make_options(VerifyCommand, values))


def verify_deployment(arguments: VerifyCommand) -> None:
    """Verify, print the checks and write the report; raises ``click.exceptions.Exit`` with 1 if one failed."""
    from adalink.tools.common.console import say
    from adalink.tools.common.environment import describe_environment
    from adalink.tools.common.quiet import quiet_libraries
    from adalink.tools.parity.suite import VerifyOptions, verify
    from adalink.tools.preflight.deployment import check_deployment
    from adalink.training.models.source import find_source

    started = time.monotonic()
    adapters = _parse_pairs(arguments.adapters, "--adapter", "NAME=FOLDER")
    task_rows = _parse_pairs(arguments.task_rows, "--rows", "NAME=FILE")
    require_rows(bool(task_rows), "columns", "template")
    columns = read_columns(arguments.columns)
    check_deployment(
        arguments.deployment, (*adapters, *task_rows), backend=arguments.backend, variant=arguments.variant
    )
    find_source(arguments.against)
    with quiet_libraries():
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
    print_report(report)
    if arguments.json_file is not None:
        write_json(arguments.json_file, report.as_json(environment))
    if not report.passed:
        raise click.exceptions.Exit(1)


def print_report(report: Report) -> None:
    """The checks as a table, then the receipt."""
    from adalink.tools.common.console import print_table

    rows = [
        (
            "pass" if check.passed else "FAIL",
            check.name,
            f"{check.measured:.3g}",
            f"{'> ' if check.name.startswith('control/') else '≤ '}{check.limit:.3g}",
            check.detail,
        )
        for check in report.checks
    ]
    print_table("Parity with PyTorch", ("", "check", "measured", "limit", "detail"), rows)
    if report.cost:
        sides = ("float32", "weights", "deployed")
        lines = [(name, *map(_figure, (row[side] for side in sides))) for name, row in report.cost.items()]
        print_table("Cost of quantising", ("", "float32", "quantised weights", "as deployed"), lines)
    for line in report.skipped:
        echo(f"Not checked: {line}")
    print_table("Receipt", ("", ""), [(key, _shown(value)) for key, value in report.receipt.items()])
    failed = [check.name for check in report.checks if not check.passed]
    if failed:
        echo(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}")
    else:
        echo(f"All {len(report.checks)} checks passed.")


def _figure(value: float) -> str:
    """A figure of the cost; nothing where there is none."""
    return "" if math.isnan(value) else f"{value:.5g}"


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{path} holds no text, expected some to measure perplexity on")
    return text


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " -> ".join(map(str, value))
    return (
        "\n".join(f"{key}: {entry}" for key, entry in value.items()) if isinstance(value, dict) else json.dumps(value)
    )


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
