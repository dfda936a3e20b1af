"""``adalink eval``: how good the tasks of a deployment are, on rows that say what is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from adalink.runtime.errors import RequestError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    backend_option,
    deployment_argument,
    make_options,
    map_option,
    task_option,
    template_option,
    threads_option,
    variant_option,
)
from adalink.tools.command_line.verb import Verb, typed_words
from adalink.tools.common.report_file import ReportFile, write_text


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of ``adalink eval``, by the names of its parameters."""

    deployment: Path
    data: Path
    columns: tuple[str, ...]
    template: str | None
    tasks: tuple[str, ...]
    against: str | None
    variants: tuple[str, ...]
    backend: str
    threads: int | None
    calibration: str | None
    html: Path | None
    output: JsonOutput


@click.command(cls=Verb, name="eval", short_help="Measure tasks on rows that say what is right.")
@deployment_argument
@click.option(
    "-d",
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Rows as JSONL, JSON, CSV, TSV or Parquet, see below.",
)
@map_option
@template_option
@task_option("A task; may be repeated. All tasks without it.", "tasks", multiple=True)
@click.option(
    "--against",
    type=click.Choice(["base", "majority"]),
    show_default="majority, for labels",
    help="Compare with the base model, or with always the commonest label.",
)
@variant_option(
    "A form of the base, such as int4; may be repeated. One that is not quantised by default.",
    "variants",
    multiple=True,
)
@backend_option
@threads_option
@click.option(
    "--calibrate",
    "calibration",
    metavar="TEXT",
    help="A prompt without content: what a task on a decoder says of it is divided out of its probabilities.",
)
@click.option("--html", type=ReportFile(), metavar="FILE", help="Write a page for people: one file, for any browser.")
@json_options("Print the report as JSON.")
def command(**values: Any) -> None:
    """Measure how often tasks of the deployment DIR are right, and what it is worth.

    Rows of --data are those of a training: {"text": "...", "label": "..."}, or {"prompt": "...", "completion": "..."},
    with images if the base sees. A task with labels is right if it gives the label. Other tasks generate text greedily,
    and are right if that is the completion. Several labels, spans and numbers have measures of their own. The verdict
    comes first: the figure with its interval of 95 % confidence, and the reference on the same rows. --json and --html
    have all of it: precision and recall of each label, confusions, calibration, wrong rows, times.

    \b
    Example:
      adalink eval ./deployment --data test.jsonl --task topics
      adalink eval ./deployment --data test.jsonl --task topics --against base --html report.html
      adalink eval ./deployment --data test.jsonl --task topics --variant onnxruntime-cpu --variant int4
    """  # noqa: D301
    options = make_options(EvalOptions, values)
    evaluate(options)
    if options.html is None:
        say_next(*typed_words(click.get_current_context()), "--html", "report.html", output=options.output)
    else:
        say_next("serve", options.deployment, output=options.output)


def evaluate(options: EvalOptions) -> None:
    """Print the report on stdout, and write its files.

    Raises:
        AdaLinkError: rows, tasks or the deployment cannot be used, or scikit-learn is missing.
    """
    from msgspec import to_builtins

    from adalink.runtime.deployment import Deployment
    from adalink.tools.evaluation.evaluate import evaluate_task, make_report, read_task_rows
    from adalink.tools.evaluation.metrics import check_installed
    from adalink.tools.evaluation.page import render_page
    from adalink.tools.evaluation.terminal import print_report
    from adalink.tools.preflight.deployment import check_deployment
    from adalink.tools.terminal.console import progress_bar

    check_installed()
    variants = options.variants or (None,)
    manifest, *_ = [
        check_deployment(options.deployment, options.tasks, backend=options.backend, variant=variant)
        for variant in variants
    ]
    if not (tasks := options.tasks or sorted(manifest.tasks)):
        raise RequestError(f"{options.deployment} has no task: add one with adalink export adapter")
    asked = read_task_rows(manifest, tasks, RowSource(options.data, read_columns(options.columns), options.template))
    reports = []
    with progress_bar() as progress:
        for variant in variants:
            with Deployment.open(
                options.deployment, options.backend, variant=variant, threads=options.threads
            ) as deployment:
                names = [key for key, one in deployment.manifest.variants.items() if one == deployment.variant]
                reports += [
                    evaluate_task(
                        deployment,
                        task,
                        variant or names[0],
                        rows,
                        progress,
                        against=options.against,
                        calibration=options.calibration,
                    )
                    for task, rows in asked.items()
                ]
    report = make_report(manifest.base.name, options.data, reports)
    options.output.give(to_builtins(report), lambda: print_report(report))
    if options.html is not None:
        write_text(options.html, render_page(report), option="--html")
