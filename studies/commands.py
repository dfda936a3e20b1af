"""``python -m studies``: methods compared on real data, as a file declares."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.tools.common.console import print_table, say
from adalink.tools.common.error_boundary import BoundaryGroup
from adalink.tools.common.quiet import quiet_libraries
from adalink.tools.common.report_file import write_json

if TYPE_CHECKING:
    from studies.experiment.settings import Study
    from studies.plan import Cell
    from studies.schedule import Finished


@click.group(cls=BoundaryGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare methods of adaptation on labelled data."""


@main.command(short_help="Do the runs of a study, and write what they say.")
@click.argument("study_file", metavar="STUDY", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the runs and the summary.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="Runs at once.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Begin no run that would end later than this.")
@click.option("--dry-run", is_flag=True, help="List the runs and how long they should take; do none.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary (or the list of runs) as JSON.")
def run(study_file: Path, out: Path, jobs: int, minutes: float | None, dry_run: bool, as_json: bool) -> None:
    """Compare methods of adaptation as the file STUDY declares.

    STUDY is TOML: bases, data sets, methods with learning rates to choose from, sizes of training data, seeds. For each
    base, data set, method and size the learning rate is chosen on validation rows, then every seed is trained with it
    and measured on test rows. A finished run is a file of OUT/runs, named by the digest of its settings and data: it is
    not done again, so an interrupted study goes on where it was. The end is OUT/summary.json, plots, and
    OUT/study.html, which needs no other file, and OUT/study.md.

    \b
    Example:
      python -m studies run studies/reduced.toml --out build/study --jobs 2
    """  # noqa: D301
    from studies.experiment.settings import read_study

    study = read_study(study_file)
    say("reading bases and data")
    # The libraries below log to stdout, which is for the result.
    with contextlib.redirect_stdout(sys.stderr), quiet_libraries():
        from adalink.training.device import precision_warning, resolve_device
        from studies.plan import count_open, make_cells
        from studies.schedule import do_runs, read_finished

        cells = make_cells(study)
        finished = read_finished(out)
        left = count_open(cells, finished)
        if left and (warning := precision_warning(resolve_device(study.device), study.training.precision)):
            say(warning)
        if not dry_run:
            say(f"{left} runs to do")
            is_done = do_runs(cells, out, finished, jobs=jobs, minutes=minutes, say=say)
    if dry_run:
        _list_runs(study, cells, finished, jobs, as_json)
        return
    summary = _report(study, cells, finished, out)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(summary)
    if not is_done:
        say(f"time is up: {summary['runs']['open']} runs are left; the same command goes on with them")


def _report(study: Study, cells: Sequence[Cell], finished: Finished, out: Path) -> dict[str, Any]:
    """Write summary, plots and page; the summary."""
    from studies.report.page import write_pages
    from studies.report.plots import draw
    from studies.report.summary import summarize

    summary = summarize(study, cells, finished)
    write_json(out / "summary.json", summary, option="--out")
    write_pages(out, summary, draw(summary, out / "plots"))
    return summary


def _list_runs(study: Study, cells: Sequence[Cell], finished: Finished, jobs: int, as_json: bool) -> None:
    """What there is to do, and how long it should take."""
    from studies.plan import Estimates, open_runs, waiting

    estimates = Estimates(list(finished.values()), study.bases)
    rows: list[dict[str, Any]] = [
        {
            "cell": cell.title,
            "purpose": run.purpose,
            "lr": run.lr or None,
            "seed": run.seed,
            "steps": run.max_steps,
            "seconds": estimates.seconds(run),
        }
        for cell, run in [*open_runs(cells, finished), *waiting(cells, finished)]
    ]
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    total = sum(known) / jobs / 60 if len(known) == len(rows) else None
    if as_json:
        click.echo(json.dumps({"runs": rows, "minutes": total}, indent=2))
        return
    print_table(
        f"{study.name}: {len(rows)} runs to do",
        ("what", "for", "learning rate", "seed", "steps", "seconds"),
        [
            (row["cell"], row["purpose"], _rate(row), row["seed"], row["steps"], _number(row["seconds"], "{:.0f}"))
            for row in rows
        ],
    )
    if total is None:
        say("how long they take is not known: of a base there is no finished run, and no seconds_per_step in the study")
    else:
        say(f"about {total:.0f} minutes with {jobs} at once, if a run takes no longer beside others")


def _print_summary(summary: dict[str, Any]) -> None:
    from studies.report.table import accuracy_rows, comparison_rows, not_compared_line, shared_rows

    print_table(summary["study"]["name"], *accuracy_rows(summary))
    if summary["comparisons"]:
        print_table("differences in accuracy, seed by seed", *comparison_rows(summary))
    if line := not_compared_line(summary):
        click.echo(line)
    if summary["shared"]:
        print_table("one for each data set, and one for all", *shared_rows(summary))


def _rate(row: dict[str, Any]) -> str:
    """A learning rate; that of a final run may still have to be chosen."""
    if row["lr"] is None:
        return "to be chosen" if row["steps"] else "-"
    return f"{row['lr']:g}"


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else form.format(value)
