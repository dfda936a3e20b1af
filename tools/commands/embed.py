"""``adalink embed``: vectors of texts by an encoder, pooled as the model's own files say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import RequestError
from adalink.runtime.storage.pooling_schema import POOLING_MODES
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
    from adalink.runtime.text_encoder import EncodedText


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """Options of ``adalink embed``; see ``Deployment.open`` and ``Deployment.encode``."""

    deployment: Path
    text: str | None
    jsonl: Path | None
    columns: tuple[str, ...]
    task: str | None
    prompt_name: str | None
    pooling: tuple[str, ...]
    normalize: bool | None
    backend: str
    variant: str | None
    threads: int | None
    output: JsonOutput


@click.command(cls=Verb, short_help="Embed texts with an encoder, as sentence-transformers does.")
@deployment_argument
@click.argument("text", required=False)
@rows_option("Rows with text and task, as JSONL, JSON, CSV, TSV or Parquet; - for JSONL from standard input.")
@map_option
@task_option("The task; the base model without it. Rows of a file may name their own.")
@click.option("--prompt-name", metavar="NAME", help="One of the model's own prompts, such as query.")
@click.option(
    "--pooling",
    type=click.Choice(POOLING_MODES),
    multiple=True,
    help="How states become a vector, instead of the model's own way. May be repeated: the vectors are joined.",
)
@click.option("--normalize/--no-normalize", default=None, help="Whether vectors have length 1, instead of likewise.")
@engine_options
@json_options("Print one JSON line for each text.")
def command(**values: Any) -> None:
    """Print the embedding of TEXT, or of each row of a file, by the encoder in DIR.

    How states become a vector, how long texts are cut and which prompt goes before them is what the model's own
    sentence-transformers files say. `adalink inspect` shows it.

    \b
    Example:
      adalink embed ./deployment "oil prices rose again" --task topics
      adalink embed ./deployment --rows rows.csv --map text=body > vectors.jsonl
    """  # noqa: D301
    options = make_options(EmbedOptions, values)
    embed(options)
    say_next("serve", options.deployment, output=options.output)


def embed(options: EmbedOptions) -> None:
    """Print vectors on stdout.

    Raises:
        click.UsageError: neither a text nor rows, or both.
        AdaLinkError: a text, or the deployment, cannot be used.
    """
    from adalink.runtime.deployment import Deployment
    from adalink.tools.preflight.deployment import check_deployment, check_row_tasks

    rows = given_texts(options.text, options.jsonl, options.columns, options.task)
    if paired := [row.origin for row in rows if row.text_pair is not None]:
        raise RequestError(f"{paired[0]}: a pair of texts has no embedding: leave text_pair out")
    manifest = check_deployment(
        options.deployment, [options.task], backend=options.backend, variant=options.variant, nested=True
    )
    check_row_tasks(manifest, rows)
    with Deployment.open(
        options.deployment, options.backend, variant=options.variant, threads=options.threads
    ) as deployment:
        cut = 0
        with options.output.lines() as json_line:
            for entry in _entries(deployment, rows, options):
                cut += entry["truncated"]
                line, is_plain = json_line(entry), options.jsonl is None and not options.output.on_stdout
                echo(" ".join(map(str, entry["embedding"])) if is_plain else line)
        if cut:
            limit = deployment.manifest.base.pooling and deployment.manifest.base.pooling.max_tokens
            say(f"{cut} of {len(rows)} texts were longer than {limit} tokens, and were cut")


def _entries(deployment: Deployment, rows: list[TextRow], options: EmbedOptions) -> Iterator[dict[str, Any]]:
    """A result for each row, in order; all rows are tokenised and checked before the first is run."""
    encoder = deployment.text_encoder
    choice = encoder.choose(options.pooling or None, options.normalize)
    prompt = None if options.prompt_name is None else encoder.prompt_named(options.prompt_name)

    def tokenize(some: Sequence[TextRow]) -> Sequence[EncodedText]:
        return encoder.tokenize([row.text for row in some], [row.task for row in some], prompt)

    encoded = prepare_rows(rows, tokenize)

    def pool(batch: Sequence[EncodedText]) -> Sequence[list[float]]:
        vectors: list[list[float]] = encoder.pool(batch, choice).tolist()
        return vectors

    for row, text, vector in answer_rows(rows, encoded, pool, "embedding"):
        tokens = {"tokens": len(text.ids), "truncated": text.is_cut}
        yield with_extras({"text": row.text, "task": row.task, **tokens, "embedding": vector}, row.extras)
