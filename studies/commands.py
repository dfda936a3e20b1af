"""``python -m studies``: run a study, summarise its runs, pack them into one file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.tools.command_line.error_boundary import BoundaryGroup
from adalink.tools.common.report_file import write_json
from adalink.tools.terminal.console import say
from adalink.tools.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from studies.experiment.settings import Study
    from studies.plan import Cell
    from studies.run_store import FinishedRuns

_study_argument = click.argument("study_file", metavar="STUDY", type=click.Path(path_type=Path))
_out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the runs and the summary."
)
_folder_argument = click.argument("out", metavar="OUT", type=click.Path(path_type=Path))


@click.group(cls=BoundaryGroup, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Compare methods of adaptation on labelled data.

    \b
    Examples:
      python -m studies run studies/files/reduced.toml --out build/study --jobs 2
      python -m studies summary studies/files/reduced.toml --out build/study
      python -m studies pack build/study
    """  # noqa: D301


@main.command(short_help="Do the runs of a study; write its summary, pages and plots.")
@_study_argument
@_out_option
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="Runs at once.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Begin no run that would end later than this.")
@click.option("--dry-run", is_flag=True, help="List the runs and how long they should take; do none.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary (or the list of runs) as JSON.")
def run(study_file: Path, out: Path, jobs: int, minutes: float | None, dry_run: bool, as_json: bool) -> None:
    """Compare methods of adaptation as the file STUDY declares.

    STUDY is TOML: bases, data sets, methods with learning rates to choose from, sizes of training data, seeds. For each
    base, data set, method and size the learning rate is chosen on validation rows. Then every seed is trained with it
    and measured on test rows.

    A finished run is a file of OUT/runs, named by the digest of its settings and data. It is not done again, so an
    interrupted study resumes where it stopped. `pack` folds these files into one table, which counts as well. The end
    is OUT/summary.json, plots, OUT/study.md, and OUT/study.html, which needs no other file.

    \b
    Examples:
      python -m studies run studies/files/reduced.toml --out build/study --jobs 2
      python -m studies run studies/files/reduced.toml --out build/study --dry-run
    """  # noqa: D301
    from studies.experiment.settings import read_study

    study = read_study(study_file)
    say("reading bases and data")
    with _quiet_stdout():
        from adalink.training.device import precision_warning, resolve_device
        from studies.plan import count_open, make_cells
        from studies.run_store import read_runs
        from studies.schedule import do_runs

        cells = make_cells(study)
        finished = read_runs(out)
        left = count_open(cells, finished)
        if left and (warning := precision_warning(resolve_device(study.device), study.training.precision)):
            say(warning)
        if not dry_run:
            say(f"{left} runs to do")
            is_done = do_runs(cells, out, finished, jobs=jobs, minutes=minutes, progress=say)
    if dry_run:
        _list_open_runs(study, cells, finished, jobs, as_json)
        return
    report = _write_report(study, cells, finished, out)
    _print_report(report, as_json)
    if not is_done:
        say(f"time is up: {report['runs']['open']} runs are left; the same command goes on with them")


@main.command(short_help="Write summary, pages and plots of the finished runs; train nothing.")
@_study_argument
@_out_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def summary(study_file: Path, out: Path, as_json: bool) -> None:
    """Write OUT/summary.json, pages and plots again from the finished runs in OUT. Nothing is trained.

    Bases and data sets are loaded: runs of other weights or other rows do not count. The summary says how many runs are
    open. OUT holds runs as files, as a table, or both.

    \b
    Examples:
      python -m studies summary studies/files/decoder.toml --out studies/results/decoder
      python -m studies summary studies/files/reduced.toml --out build/study --json
    """  # noqa: D301
    from adalink.runtime.errors import DataError
    from studies.experiment.settings import read_study
    from studies.run_store import read_runs

    study = read_study(study_file)
    finished = read_runs(out)
    if not finished:
        raise DataError(f"{out}: holds no finished run; name the folder that the study was run with as --out")
    say("reading bases and data")
    with _quiet_stdout():
        from studies.plan import make_cells

        cells = make_cells(study)
    _print_report(_write_report(study, cells, finished, out), as_json)


@main.command(short_help="Fold the files of finished runs into one compressed table.")
@_folder_argument
def pack(out: Path) -> None:
    """Fold the files of OUT/runs into OUT/runs.jsonl.gz: JSON lines, compressed, the same bytes for the same runs.

    Nothing is lost: `unpack` writes the files again. A study goes on from the table as from the files.

    \b
    Example:
      python -m studies pack build/study
    """  # noqa: D301
    from studies.run_store import TABLE, pack

    folded, total = pack(out)
    say(f"{folded} runs packed; {out / TABLE} holds {total}" if total else f"{out} holds no finished run")


@main.command(short_help="Write the runs of the table as files again.")
@_folder_argument
def unpack(out: Path) -> None:
    """Write every run of OUT/runs.jsonl.gz as a file of OUT/runs, and remove the table.

    A run whose file is then removed is done again by `run`.

    \b
    Example:
      python -m studies unpack build/study
    """  # noqa: D301
    from studies.run_store import runs_folder, unpack

    count = unpack(out)
    say(f"{count} runs unpacked to {runs_folder(out)}" if count else f"{out} holds no packed run")


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what libraries log on stdout to stderr: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr), quiet_libraries():
        yield


def _write_report(study: Study, cells: Sequence[Cell], finished: FinishedRuns, out: Path) -> dict[str, Any]:
    """Write summary, plots and pages; the summary."""
    from studies.report.page import write_pages
    from studies.report.plots import draw
    from studies.report.summary import summarize

    report = summarize(study, cells, finished)
    write_json(out / "summary.json", report, option="--out")
    write_pages(out, report, draw(report, out / "plots"))
    return report


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    from studies.report.terminal import print_summary

    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        print_summary(report)


def _list_open_runs(study: Study, cells: Sequence[Cell], finished: FinishedRuns, jobs: int, as_json: bool) -> None:
    """What there is to do, and how long it should take."""
    from studies.plan import Estimates, open_runs, waiting
    from studies.report.terminal import print_open_runs

    estimates = Estimates(list(finished.values()), study.bases)
    runs: list[dict[str, Any]] = [
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
    known = [run["seconds"] for run in runs if run["seconds"] is not None]
    minutes = sum(known) / jobs / 60 if len(known) == len(runs) else None
    if as_json:
        click.echo(json.dumps({"runs": runs, "minutes": minutes}, indent=2))
    else:
        print_open_runs(study.name, runs, minutes, jobs)
