"""``adalink compress``: an adapter with fewer dimensions, in fewer bits, and what that loses on rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import ConfigError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.runtime.storage.adapter import WEIGHTS_FILE
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    backend_option,
    make_options,
    map_option,
    out_option,
    template_option,
    threads_option,
    variant_option,
)
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.console import say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adalink.export.adapter.compression import Compressed
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.storage.adapter import Adapter
    from adalink.tools.evaluation.answers import Progress
    from adalink.tools.evaluation.loss import Loss

_WEIGHT_DTYPES = {"8": "int8", "4": "int4", "32": "float32"}


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of ``adalink compress``, by the names of its parameters."""

    adapter: Path
    deployment: Path
    out: Path
    rank: int | None
    energy: float | None
    bits: str
    data: Path
    columns: tuple[str, ...]
    template: str | None
    weigh_by: Path | None
    most_loss: float
    variant: str | None
    backend: str
    threads: int | None
    replace: bool
    output: JsonOutput

    @property
    def rows(self) -> RowSource:
        """The rows that what is lost is measured on."""
        return RowSource(self.data, read_columns(self.columns), self.template)


@click.command(cls=Verb, name="compress", short_help="Make an adapter smaller, and measure what that loses.")
@click.argument("adapter", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option(
    "--deployment",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="A deployment of its base. It is not changed.",
)
@out_option("The adapter folder to write.")
@click.option("--rank", type=click.IntRange(min=1), help="Dimensions to keep; all without it.")
@click.option(
    "--energy",
    metavar="SHARE",
    type=click.FloatRange(0, 1, min_open=True),
    help="Instead: as many dimensions as make this share of the squared change of embeddings, such as 0.99.",
)
@click.option(
    "--bits",
    type=click.Choice(list(_WEIGHT_DTYPES)),
    default="8",
    show_default=True,
    help="Of each number, with one scale for each dimension.",
)
@click.option(
    "-r", "--rows", "data", required=True, type=click.Path(path_type=Path), help="Rows that say what is right."
)
@map_option
@template_option
@click.option(
    "--weigh-by",
    metavar="ROWS",
    type=click.Path(path_type=Path),
    help="Rows of the training: what their tokens need is kept first. Every token counts once without it.",
)
@click.option(
    "--most-loss",
    metavar="POINTS",
    default=0.5,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Percentage points that accuracy may fall (F1 of several labels and spans, R2 of numbers).",
)
@variant_option("The form of the base that answers the rows, such as int4.")
@backend_option
@threads_option
@click.option("--replace", is_flag=True, help="Take the place of an adapter that is there already.")
@json_options("Print the result as JSON.")
def command(**values: Any) -> None:
    """Write a smaller copy of ADAPTER, a folder that training wrote, to OUT.

    The dimensions of a bottleneck without activation are put in the order of what they do to embeddings; the last
    are cut off. The rest are stored in 8 or 4 bits. Both adapters answer the rows: if the copy loses more than
    --most-loss, nothing is written, and the exit code is 1.

    The copy is an adapter like any other. Its order makes it nested: where a task is asked for, topics@8 is its first
    8 dimensions.

    \b
    Example:
      adalink compress ./topics --deployment ./deployment --rank 8 --rows test.jsonl --out ./topics-8
      adalink compress ./topics --deployment ./deployment --energy 0.99 --bits 4 --rows test.jsonl --out ./topics-4bit
      adalink export adapter ./topics-8 --out ./deployment
    """  # noqa: D301
    compress(make_options(CompressOptions, values))


def compress(options: CompressOptions) -> None:
    """Write the adapter, or exit with 1 if it loses too much.

    Raises:
        click.UsageError: rank and energy are both given.
        AdaLinkError: adapter, deployment or rows cannot be used, or the adapter cannot be compressed so.
    """
    if options.rank is not None and options.energy is not None:
        raise click.UsageError("give one of --rank and --energy: either says how many dimensions are kept")
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.storage.adapter import CONFIG_FILE, encode_adapter, read_adapter
    from adalink.runtime.storage.atomic import write_through
    from adalink.runtime.storage.atomic_folder import replace_folder
    from adalink.runtime.storage.contract import check_adapter
    from adalink.tools.evaluation.answers import check_labels, kind_of
    from adalink.tools.evaluation.loss import measure_loss
    from adalink.tools.evaluation.metrics import check_installed
    from adalink.tools.evaluation.rows import TEXT, read_eval_rows
    from adalink.tools.preflight.deployment import check_deployment
    from adalink.tools.terminal.console import progress_bar

    check_installed()
    out = _target(options)
    manifest = check_deployment(options.deployment, backend=options.backend, variant=options.variant)
    adapter = read_adapter(options.adapter)
    check_adapter(adapter, manifest.base, f"adapter {options.adapter}", holder=f"deployment {options.deployment}")
    kind, labels = kind_of(manifest.base, adapter.config, options.adapter.name)
    rows = read_eval_rows(options.rows, kind)
    kind = TEXT if any(row.images for row in rows) else kind
    if labels:
        check_labels(rows, kind, labels, options.adapter.name, options.data)
    counted = [] if options.weigh_by is None else read_eval_rows(options.rows.at(options.weigh_by), kind)
    with (
        progress_bar() as progress,
        replace_folder(out, f"adapter {out}") as staging,
        Deployment.open(
            options.deployment, options.backend, variant=options.variant, threads=options.threads
        ) as deployment,
    ):
        texts = [text for row in counted for text in (row.text, row.text_pair, row.completion) if text]
        small = _compress(adapter, options, deployment, texts, progress)
        config, weights = encode_adapter(small.adapter)
        write_through(staging / CONFIG_FILE, config)
        write_through(staging / WEIGHTS_FILE, weights)
        loss = measure_loss(deployment, options.adapter, staging, kind, rows, progress)
        result = _describe(adapter, small, loss, options, len(weights))
        if loss.points > options.most_loss:
            options.output.give(result, lambda: None)
            say(f"nothing was written: {_loss_line(result)}. Keep more with --rank or --bits, or allow it: --most-loss")
            raise click.exceptions.Exit(1)
    options.output.give(result, lambda: _show(result))
    say_next("export", "adapter", out, "--out", options.deployment, output=options.output)


def _target(options: CompressOptions) -> Path:
    """The folder to write, checked before anything is computed."""
    from adalink.training.run_folder import check_target

    out = options.out.resolve()
    check_target(out)
    if out == options.adapter.resolve():
        raise ConfigError(f"--out is the adapter {options.adapter} itself: name another folder, so that both are there")
    if out.is_dir() and any(out.iterdir()) and not options.replace:
        raise ConfigError(f"{options.out} holds an adapter already: pass --replace to put this one in its place")
    return out


def _compress(
    adapter: Adapter, options: CompressOptions, deployment: Deployment, texts: Sequence[str], progress: Progress
) -> Compressed:
    """The smaller adapter; texts, if there are any, say how often each token counts."""
    import numpy as np

    from adalink.export.adapter.compression import compress_adapter, second_moment
    from adalink.runtime.storage.embedding_table import open_table
    from adalink.runtime.storage.verification_cache import verify_once

    base = deployment.manifest.base
    verified = verify_once(options.deployment, deployment.manifest, [base.embeddings])
    table = open_table(options.deployment / base.embeddings, base)
    verified.check_unchanged()
    counts = None
    if texts:
        ids = [token for text in texts for token in deployment.tokenizer.encode(text)]
        counts = np.bincount(ids, minlength=len(table))
    moment = second_moment(table, counts, progress)
    return compress_adapter(
        adapter, moment, rank=options.rank, energy=options.energy, weight_dtype=_WEIGHT_DTYPES[options.bits]
    )


def _describe(
    adapter: Adapter, small: Compressed, loss: Loss, options: CompressOptions, file_bytes: int
) -> dict[str, Any]:
    from adalink.runtime.storage.adapter_spec import rank_of, show_rank

    config = small.adapter.config
    kept = None
    if len(small.energy):
        kept = float(small.energy[rank_of(config.rank, "text") - 1])
    return {
        "adapter": str(options.out),
        "written": loss.points <= options.most_loss,
        "rank": config.rank,
        "rank_before": show_rank(adapter.config.rank),
        "weight_dtype": config.weight_dtype,
        "nested": config.nested,
        "energy": kept,
        "size_bytes": file_bytes,
        "size_bytes_before": (options.adapter / WEIGHTS_FILE).stat().st_size,
        **asdict(loss),
        "loss_points": loss.points,
        "most_loss": options.most_loss,
    }


def _show(result: Mapping[str, Any]) -> None:
    before, after = result["size_bytes_before"] / 1e3, result["size_bytes"] / 1e3
    echo(
        f"{result['adapter']}: rank {result['rank']}, {result['weight_dtype']}, {after:.1f} kB instead of {before:.1f}"
    )
    if result["energy"] is not None:
        echo(f"  it makes {100 * result['energy']:.2f} % of the squared change of text embeddings")
    echo(f"  {_loss_line(result)}")


def _loss_line(result: Mapping[str, Any]) -> str:
    measures = f"{result['measure']} {100 * result['after']:.1f} instead of {100 * result['before']:.1f} %"
    return f"{result['same']} of {result['rows']} answers are the same; {measures}"
