"""``PYTHONPATH=tests python -m fuzz``: mutated inputs, kills, threads and a soak, by hand (``make fuzz``)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from fuzz.campaign import KINDS, Totals, run
from fuzz.outcomes import BAD, GOOD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_json_option = click.option("--json", "report", type=click.Path(path_type=Path), help="File of the figures.")
_corpus_option = click.option(
    "--corpus",
    default=Path("build/fuzz/corpus"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the whole inputs; made if it is not there.",
)
_seed_option = click.option("--seed", default=0, show_default=True, help="Seed of the first input.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main() -> None:
    """Feed the kit what it must refuse or answer rightly, and count what happens."""


@main.command()
@_corpus_option
@_seed_option
@_json_option
@click.option("--seconds", type=float, help="Stop after this time; 600 seconds if no number of inputs is given.")
@click.option("--inputs", type=int, help="Stop after so many inputs.")
@click.option("--jobs", default=1, help="Worker processes.")
@click.option(
    "--kind", "names", multiple=True, type=click.Choice(sorted(KINDS)), help="A kind of input; all by default."
)
@click.option("--keep", default=Path("build/fuzz/failures"), type=click.Path(path_type=Path), help="Failed inputs.")
def inputs(
    corpus: Path,
    seed: int,
    report: Path | None,
    seconds: float | None,
    inputs: int | None,
    jobs: int,
    names: tuple[str, ...],
    keep: Path,
) -> None:
    """Mutate inputs of every kind."""
    _corpus(corpus)
    with _bar() as bar, tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        seconds = 600.0 if seconds is None and inputs is None else seconds
        shown = bar.add_task("inputs", total=inputs or int(seconds or 0))

        def progress(totals: Totals) -> None:
            bad = sum(totals.of(name) for name in BAD)
            done = totals.inputs if inputs else int(totals.seconds)
            bar.update(shown, completed=done, description=f"{totals.inputs} inputs, {bad} failed")

        limits = {"seconds": seconds, "inputs": inputs, "jobs": jobs, "names": names}
        totals = run(corpus.resolve(), Path(work), seed=seed, **limits, keep=keep, progress=progress)
    _end(totals.as_json(), report, failed=any(totals.of(name) for name in (*BAD, "harness")))


@main.command()
@_corpus_option
@click.argument("kind", type=click.Choice(sorted(KINDS)))
@click.argument("seed", type=int)
def repeat(corpus: Path, kind: str, seed: int) -> None:
    """Run one input again, in a worker of its own."""
    from fuzz.campaign import Worker

    _corpus(corpus)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        worker = Worker(corpus.resolve(), Path(work))
        outcome, seconds = worker.answer(kind, seed)
        worker.close()
    click.echo(f"{outcome.kind} in {seconds:.2f} s: {outcome.detail}")
    sys.exit(outcome.kind not in GOOD)


@main.command()
@_corpus_option
@_seed_option
@_json_option
@click.option("--kills", "count", default=1000, help="Number of kills.")
@click.option("--seconds", type=float, help="Stop after this time, whatever their number.")
@click.option("--change", "names", multiple=True, help="A change of a deployment; all by default.")
def kills(
    corpus: Path, seed: int, report: Path | None, count: int, seconds: float | None, names: tuple[str, ...]
) -> None:
    """Kill changes of a deployment at random moments."""
    from fuzz.kills import Kills, run_kills

    _corpus(corpus)
    with _bar() as bar, tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        shown = bar.add_task("kills", total=count)

        def progress(counted: Kills) -> None:
            bar.update(shown, completed=counted.kills, description=f"{len(counted.faults)} faults")

        limits = {"seed": seed, "seconds": seconds, "names": names}
        counted = run_kills(corpus.resolve(), Path(work), count, **limits, progress=progress)
    _end(counted.as_json(), report, failed=bool(counted.faults))


@main.command()
@_corpus_option
@_seed_option
@_json_option
@click.option("--threads", "count", default=64, help="Number of threads.")
@click.option("--each", default=100, help="Requests of each thread.")
def threads(corpus: Path, seed: int, report: Path | None, count: int, each: int) -> None:
    """Compare the results of many threads on one deployment with those of one."""
    from fuzz.threads import run_threads

    _corpus(corpus)
    figures = run_threads(corpus / "text" / "deployment", threads=count, each=each, seed=seed)
    _end(figures, report, failed=bool(figures["differing"]))


@main.command()
@_corpus_option
@_seed_option
@_json_option
@click.option("--seconds", default=600.0, help="How long.")
@click.option("--clients", default=64, help="Clients that ask at once.")
def soak(corpus: Path, seed: int, report: Path | None, seconds: float, clients: int) -> None:
    """Serve clients that come, leave and are killed, while tasks change; watch the server's memory."""
    from fuzz.soak import MOST_GROWN_KB, Soak, run_soak

    _corpus(corpus)
    with _bar() as bar, tempfile.TemporaryDirectory(prefix="soak-") as work:
        shown = bar.add_task("soak", total=int(seconds))

        def progress(found: Soak) -> None:
            what = f"{sum(found.counts.values())} answers, {len(found.wrong)} wrong"
            bar.update(shown, completed=int(found.samples[-1][0]), description=what)

        found = run_soak(corpus.resolve() / "text", Path(work), seconds, clients, seed, progress)
    _end(found.as_json(), report, failed=bool(found.wrong) or found.grown_kb > MOST_GROWN_KB)


@main.command()
@_json_option
@click.option("--name", "part", default="", help="A part of the faults' names; all by default.")
def mutants(report: Path | None, part: str) -> None:
    """Put known faults into copies of the source; the test of each must fail."""
    from fuzz.mutant import is_caught
    from fuzz.mutants import MUTANTS

    chosen = [mutant for mutant in MUTANTS if part in mutant.name]
    with _bar() as bar:
        shown = bar.add_task("mutants", total=len(chosen))
        found: dict[str, bool] = {}
        for mutant in chosen:
            bar.update(shown, description=mutant.name)
            found[mutant.name] = is_caught(mutant)[0]
            bar.advance(shown)
    _end(
        {"mutants": len(found), "caught": sum(found.values()), "by_name": found}, report, failed=not all(found.values())
    )


@main.command()
@click.argument("reports", nargs=-1, type=click.Path(path_type=Path))
def page(reports: tuple[Path, ...]) -> None:
    """Take the figures of REPORTS into the page on reliability, and write its tables again.

    Several reports of inputs, or of kills, are added up.
    """
    from fuzz.page import add, add_kills, take, write_page

    read = [json.loads(path.read_text(encoding="utf-8")) for path in reports]
    for mark, together in (("classes", add), ("changes", add_kills)):
        if parts := [report for report in read if mark in report]:
            take(together(parts))
    for report in read:
        if not {"classes", "changes"} & report.keys():
            take(report)
    write_page()


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))


def _corpus(folder: Path) -> None:
    if not (folder / "study.toml").is_file():
        from fuzz.corpus import make_corpus

        click.echo(f"making {folder}", err=True)
        make_corpus(folder)


def _end(figures: dict[str, Any], report: Path | None, *, failed: bool) -> None:
    text = json.dumps(figures, indent=2)
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(text + "\n")
    click.echo(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(prog_name="python -m fuzz")
