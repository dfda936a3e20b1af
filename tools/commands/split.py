"""``adalink split``: a file of rows becomes rows to learn from and rows to test with."""

from __future__ import annotations

from pathlib import Path

import click

from adalink.runtime.rows.source import RowSource, read_columns
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import map_option, out_option, template_option
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo


@click.command(cls=Verb, short_help="Divide rows into those to learn from and those to test with.")
@click.argument("rows", metavar="ROWS", type=click.Path(path_type=Path))
@out_option("Folder of both files.")
@map_option
@template_option
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the lot.")
@json_options("Print the result as JSON.")
def command(
    rows: Path, out: Path, columns: tuple[str, ...], template: str | None, seed: int, output: JsonOutput
) -> None:
    """Divide ROWS into OUT/train.jsonl and OUT/test.jsonl: a fifth is held out, by lot.

    Every label has its share, and equal texts stay together. Columns get the kit's names, and --template makes prompts:
    other verbs then need neither option.

    \b
    Example:
      adalink split news.csv --map text=body,label=topic --out rows
      adalink split news.csv --template "Text: {body} Topic:" --map label=topic --out rows
    """  # noqa: D301
    from adalink.training.data.split_rows import split_rows

    files = split_rows(RowSource(rows, read_columns(columns), template), out, seed)
    counts = len(files.split.train), len(files.split.held_out)
    names = {"train": str(files.train), "test": str(files.test)}
    sizes = dict(zip(("train_rows", "test_rows"), counts, strict=True))

    def show() -> None:
        share = ", with every label's share" if files.split.stratified else ""
        echo(f"{files.train}: {counts[0]} rows to learn from")
        echo(f"{files.test}: {counts[1]} rows to test with, by lot (seed {seed}{share})")

    output.give({**names, **sizes, "split": files.split.as_record()}, show)
    data = ("--data", files.train, "--eval", files.test)
    say_next("train", "--base", "MODEL", *data, "--out", "adapter", output=output)
