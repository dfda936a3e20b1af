"""``adalink classify``: labels of texts, by tasks that were trained on rows with labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    deployment_argument,
    engine_options,
    make_options,
    map_option,
    rows_option,
    task_option,
)
from adalink.tools.command_line.verb import Verb
from adalink.tools.rows.prompt_rows import with_extras
from adalink.tools.rows.text_rows import TextRow, answer_rows, given_texts, prepare_rows
from adalink.tools.terminal.terminal_text import echo
from adalink.tools.terminal.verbose import say

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.text_classifier import Classification, PreparedPrompt, PreparedText

# Likeliest labels that are shown without --json.
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """Options of ``adalink classify``; see ``Deployment.open`` and ``Deployment.classify``."""

    deployment: Path
    text: str | None
    text_pair: str | None
    jsonl: Path | None
    columns: tuple[str, ...]
    task: str | None
    backend: str
    variant: str | None
    threads: int | None
    output: JsonOutput
    labels: tuple[str, ...]
    calibration: str | None


@click.command(cls=Verb, short_help="Classify texts by tasks that were trained with labels.")
@deployment_argument
@click.argument("text", required=False)
@click.option("--text-pair", metavar="TEXT", help="The second text of a pair.")
@rows_option("Rows with text, text_pair, task, as JSONL, JSON, CSV, TSV or Parquet; - for JSONL from standard input.")
@map_option
@task_option("The task. Rows of a file may name their own.")
@click.option(
    "--labels",
    multiple=True,
    metavar="TEXT",
    help="On a decoder, a completion to choose from; repeat it for each. The task's own without it.",
)
@click.option(
    "--calibrate",
    "calibration",
    metavar="TEXT",
    help="Likewise, a prompt without content: what the task says of it is divided out of the probabilities.",
)
@engine_options
@json_options("Print one JSON line for each text.")
def command(**values: Any) -> None:
    """Print what a task says of TEXT, or of each row of a file: labels with probabilities, a number, or spans.

    Spans have the first character and the one behind the last. A text that is longer than those of the training may be
    is cut, and the result says so. On a decoder TEXT is a prompt, as in training, and labels are its completions.

    \b
    Example:
      adalink classify ./deployment "oil prices rose again" --task topics
      adalink classify ./deployment --rows rows.csv --map text=body --task topics > labels.jsonl
    """  # noqa: D301
    options = make_options(ClassifyOptions, values)
    classify(options)
    say_next("serve", options.deployment, output=options.output)


def classify(options: ClassifyOptions) -> None:
    """Print labels on stdout.

    Raises:
        click.UsageError: neither a text nor rows, or both.
        AdaLinkError: a text, a task or the deployment cannot be used.
    """
    from adalink.runtime.deployment import Deployment
    from adalink.tools.preflight.deployment import check_deployment, check_row_tasks

    rows = given_texts(options.text, options.jsonl, options.columns, options.task, options.text_pair)
    manifest = check_deployment(
        options.deployment, [options.task], backend=options.backend, variant=options.variant, nested=True
    )
    check_row_tasks(manifest, rows)
    if not options.labels and (unnamed := [row.origin for row in rows if row.task is None]):
        place = f"{unnamed[0]}: " if unnamed[0] else ""
        raise click.UsageError(
            f"{place}name a task with --task; deployed are: {', '.join(sorted(manifest.tasks)) or 'none'}"
        )
    with Deployment.open(
        options.deployment, options.backend, variant=options.variant, threads=options.threads
    ) as deployment:
        cut = 0
        with options.output.lines() as json_line:
            for row, result in _results(deployment, rows, options):
                cut += result.truncated
                answer = {"text": row.text, "task": row.task, **result.as_record()}
                line = json_line(with_extras(answer, row.extras))
                is_plain = options.jsonl is None and not options.output.on_stdout
                echo("\n".join(_lines(result)) if is_plain else line)
        if cut:
            say(f"{cut} of {len(rows)} texts were longer than those of their training may be, and were cut")


def _results(
    deployment: Deployment, rows: list[TextRow], options: ClassifyOptions
) -> Iterator[tuple[TextRow, Classification]]:
    """A result for each row, in order; all rows are tokenised and checked before the first is run."""
    classifier = deployment.text_classifier

    def prepare(some: Sequence[TextRow]) -> Sequence[PreparedText | PreparedPrompt]:
        texts = [row.text if row.text_pair is None else (row.text, row.text_pair) for row in some]
        return classifier.prepare(texts, [row.task for row in some], options.labels or None, options.calibration)

    prepared = prepare_rows(rows, prepare)
    for row, text, values in answer_rows(rows, prepared, classifier.scores, "classifying"):
        yield row, text.read(values)


def _lines(result: Classification) -> list[str]:
    """A result for people."""
    if result.value is not None:
        return [f"{result.value:.6g}"]
    if not result.probabilities:
        spans = [f"{span.start}-{span.end} {span.label} {span.probability:.3f}: {span.text}" for span in result.spans]
        return spans or ["no span"]
    ranked = sorted(result.probabilities.items(), key=lambda pair: -pair[1])
    if result.label is not None:
        return [f"{share:.3f} {label}" for label, share in ranked[:_SHOWN]]
    chosen = [f"{share:.3f} {label}" for label, share in ranked if label in result.labels]
    return chosen or [f"no label; the likeliest: {ranked[0][1]:.3f} {ranked[0][0]}"]
