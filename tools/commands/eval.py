"""``adalink eval``: how good the tasks of a deployment are, on rows that say what is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from adalink.runtime.errors import RequestError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.tools.common.options import make_options, map_option, template_option
from adalink.tools.common.report_file import ReportFile, write_json


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
    json_path: Path | None


@click.command(name="eval", short_help="Measure tasks on rows that say what is right.")
@click.argument("deployment", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Rows as JSONL, JSON, CSV, TSV or Parquet, see below.",
)
@map_option
@template_option
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="A task; may be repeated. All tasks without it.")
@click.option(
    "--against",
    type=click.Choice(["base", "majority"]),
    show_default="majority, for labels",
    help="Compare with the base model, or with always the commonest label.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME",
    help="A form of the base, such as int4; may be repeated. One that is not quantised by default.",
)
@click.option("--backend", default="onnxruntime-cpu", show_default=True, help="Which engine.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option(
    "--calibrate",
    "calibration",
    metavar="TEXT",
    help="A prompt without content: what a task on a decoder says of it is divided out of its probabilities.",
)
@click.option("--html", type=ReportFile(), metavar="FILE", help="Write a page for people: one file, for any browser.")
@click.option("--json", "json_path", type=ReportFile(), metavar="FILE", help="Write the report as JSON.")
def command(**values: Any) -> None:
    """Measure how often tasks of the deployment DIR are right, and what it is worth.

    Rows of --data are {"text": "...", "label": "..."}, or {"prompt": "...", "completion": "..."}. A task with labels
    is right if it gives the label. Other tasks generate text greedily, and are right if that is the completion. The
    verdict comes first: accuracy with its interval of 95 % confidence, and the reference on the same rows. --json and
    --html have all of it: precision and recall of each label, confusions, calibration, wrong rows, times.

    \b
    Example:
      adalink eval ./deployment --data test.jsonl --task topics
      adalink eval ./deployment --data test.jsonl --task topics --against base --html report.html
      adalink eval ./deployment --data test.jsonl --task topics --variant onnxruntime-cpu --variant int4
    """  # noqa: D301
    evaluate(make_options(EvalOptions, values))


def evaluate(options: EvalOptions) -> None:
    """Print the report on stdout, and write its files.

    Raises:
        AdaLinkError: rows, tasks or the deployment cannot be used, or scikit-learn is missing.
    """
    from msgspec import to_builtins

    from adalink.runtime.deployment import Deployment
    from adalink.runtime.storage.atomic import replace_file
    from adalink.tools.common.console import progress_bar
    from adalink.tools.evaluation.evaluate import evaluate_task, make_report
    from adalink.tools.evaluation.metrics import check_installed
    from adalink.tools.evaluation.page import render_page
    from adalink.tools.evaluation.rows import read_eval_rows
    from adalink.tools.evaluation.terminal import print_report
    from adalink.tools.preflight.deployment import check_deployment

    check_installed()
    for variant in options.variants or (None,):
        check_deployment(options.deployment, options.tasks, backend=options.backend, variant=variant)
    rows = read_eval_rows(RowSource(options.data, read_columns(options.columns), options.template))
    reports = []
    with progress_bar() as progress:
        for variant in options.variants or (None,):
            with Deployment.open(
                options.deployment, options.backend, variant=variant, threads=options.threads
            ) as deployment:
                names = [key for key, one in deployment.manifest.variants.items() if one == deployment.variant]
                if not (tasks := options.tasks or deployment.tasks):
                    raise RequestError(f"{options.deployment} has no task: add one with adalink export adapter")
                reports += [
                    evaluate_task(
                        deployment,
                        task,
                        variant or names[0],
                        rows,
                        options.data,
                        progress,
                        against=options.against,
                        calibration=options.calibration,
                    )
                    for task in tasks
                ]
                report = make_report(deployment, options.data, reports)
    print_report(report)
    if options.json_path is not None:
        write_json(options.json_path, to_builtins(report))
    if options.html is not None:
        page = render_page(report).encode()
        replace_file(options.html, page, repair="choose a writable place with --html", private=True)
