"""``adalink train``: rows of prompt and completion become an adapter folder."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import click

from adalink.runtime.errors import BackendUnavailableError
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.runtime.storage.adapter_spec import ACTIVATIONS, SCOPES
from adalink.tools.command_line.head_options import head_options
from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import assume_pretokenizer_option, make_options, map_option, template_option
from adalink.tools.command_line.resumption import resumable
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import Verb
from adalink.tools.commands.train_options import METHOD, TrainOptions
from adalink.tools.terminal.console import say
from adalink.tools.terminal.interrupts import Interrupts
from adalink.tools.terminal.step_line import StepLine
from adalink.tools.terminal.terminal_text import echo
from adalink.tools.terminal.verbose import is_quiet
from adalink.training.loop.options import REPORTERS, LoopOptions
from adalink.training.method.config import INITS
from adalink.training.models.hub_access import hub_access
from adalink.training.settings import DEVICES, PRECISIONS, RATES, SEARCHED_INIT, TrainSettings

# Where examples put a deployment.
_DEPLOYMENT = "deployment"


@click.command(cls=Verb, name="train", short_help="Train an adapter on rows of prompts, or of texts with labels.")
@click.option(
    "-m",
    "--base",
    required=True,
    metavar="MODEL",
    shell_complete=complete_files,
    help="Model folder, GGUF file or hub id.",
)
@click.option(
    "-d",
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Rows to learn from: JSONL, JSON, CSV, TSV, Parquet.",
)
@click.option(
    "--eval",
    "eval_data",
    type=click.Path(path_type=Path),
    show_default="a fifth of --data, by --seed, each label's share",
    help="Rows to measure on.",
)
@hub_options
@map_option
@template_option
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Adapter folder to write or replace.")
@click.option(
    "--rank",
    "ranks",
    multiple=True,
    default=[str(METHOD.rank)],
    show_default=True,
    metavar="R | MODALITY=R",
    help="Width of the bottleneck; one for each modality if repeated; 0 for none.",
)
@click.option("--activation", default=METHOD.activation, show_default=True, type=click.Choice(ACTIVATIONS))
@click.option(
    "--modality",
    "modalities",
    multiple=True,
    help="What is adapted: text, or image for a base that takes images; may be repeated. Text alone without it.",
)
@click.option("--bias", is_flag=True, help="Train biases too.")
@click.option("--dropout", default=METHOD.dropout, show_default=True, help="Dropout in the bottleneck.")
@click.option(
    "--scope",
    default=METHOD.scope,
    show_default=True,
    type=click.Choice(SCOPES),
    help="Adapt every position, or the prompt alone.",
)
@click.option(
    "--soft-tokens",
    default=METHOD.soft_tokens,
    show_default=True,
    help="Trained vectors before each row's first token; alone with --rank 0.",
)
@click.option(
    "--init",
    show_default=f"{METHOD.init}; {SEARCHED_INIT} where --search chooses the rate",
    type=click.Choice(INITS),
    help="How the bottleneck starts: uniform, centered on the base's embeddings, or along the gradient of some rows.",
)
@click.option(
    "--lr",
    type=float,
    show_default=", ".join(f"{rates[0]:g} if {init}" for init, rates in RATES.items()),
    help="Highest learning rate.",
)
@click.option("--max-steps", default=TrainSettings.max_steps, show_default=True, help="Optimizer steps.")
@click.option("--batch-size", default=TrainSettings.batch_size, show_default=True, help="Rows a step.")
@click.option("--max-length", default=TrainSettings.max_length, show_default=True, help="Most tokens a row may have.")
@click.option("--save-steps", default=TrainSettings.save_steps, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--eval-steps",
    type=click.IntRange(min=0),
    show_default="a fifth of --max-steps",
    help="Steps between points of the evaluation curve; 0 for none. They do not change the adapter.",
)
@click.option(
    "--early-stopping",
    type=click.IntRange(min=1),
    metavar="PATIENCE",
    help="End after so many evaluations without a lower loss, on a tenth of the training rows; the best is kept.",
)
@click.option(
    "--report-to",
    default=LoopOptions.report_to,
    show_default=True,
    type=click.Choice(REPORTERS),
    help="Draw the curves as they come: TensorBoard's files are in OUT.logs.",
)
@click.option("--seed", default=TrainSettings.seed, show_default=True, help="Seed of weights, order and dropout.")
@click.option("--device", default=TrainSettings.device, show_default=True, type=click.Choice(DEVICES))
@click.option(
    "--precision",
    default=TrainSettings.precision,
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Of the products in a training step; bfloat16 is for hardware that has it.",
)
@click.option(
    "--search",
    "minutes",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MINUTES",
    help="First choose rate, rank and activation, those of them that are not given, within this time.",
)
@click.option(
    "--labels",
    multiple=True,
    metavar="TEXT",
    help="A completion that is a label, for `adalink classify`; repeat it for each. By default all, if few.",
)
@head_options
@assume_pretokenizer_option
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same settings.")
@json_options("Print the report as JSON.")
def command(**values: Any) -> None:
    """Train an AdaLink adapter for a frozen MODEL on rows of prompt and completion, or of text and labels.

    Each row has the columns prompt and completion; the loss is on the completion only. Rows with messages, the last of
    which is the reply, go through the model's chat template. For a base that takes images a row may have images,
    ["a.png"], too, paths from the file's own folder, with one placeholder in the prompt for each, which PaliGemma may
    do without. OUT gets the adapter, the page evaluation.html, a model card and training.json: data digests, settings,
    curves, and exact-match accuracy of the base and of the adapter on the eval rows. Checkpoints lie in OUT.checkpoints
    until the run is done. Ctrl-C saves one, and says which command goes on.

    For an encoder a row has text and label, and the adapter gets a head. "text_pair" makes it a pair.
    A label with a decimal point is a regression. {"text", "labels": [...]} has several labels. {"text", "spans":
    [{"start", "end", "label"}]}, or {"tokens", "tags"} in BIO, label parts of a text. Longer texts are cut to
    --max-length. `adalink classify` gives the labels.

    --search holds out a tenth of the rows of --data (16 to 200 of them) and trains candidates on the others: all for a
    few steps, the better half for twice as many, and so on, as many as the machine can do in that time. The one with
    the lowest loss on the rows held out is then trained on all rows of --data, as if its settings had been given. The
    eval rows play no part in the choice. training.json has every trial.

    \b
    Examples:
      adalink train --base ./SmolLM2-135M-Instruct --data train.jsonl --eval eval.jsonl --out ./adapters/topics
      adalink train ... --data news.csv --map text=body,label=topic --template "Text: {text} Topic:"
      adalink train ... --search 30                                  # choose rate, rank and activation
      adalink train ... --search 10 --rank 16 --activation identity  # choose the rate alone
      adalink train --base ./all-MiniLM-L6-v2 --data train.jsonl --eval eval.jsonl --out ./adapters/intent
    """  # noqa: D301
    options = make_options(TrainOptions, values)
    train_adapter(options)
    if Path(_DEPLOYMENT, "manifest.json").is_file():
        say_next("export", "adapter", options.out, "--out", _DEPLOYMENT, output=options.output)
    else:
        revision = ("--revision", options.access.revision)
        say_next("export", "base", options.base, *revision, "--out", _DEPLOYMENT, output=options.output)


def train_adapter(options: TrainOptions) -> None:
    """Train, and print the report or a line of it on stdout.

    Raises:
        AdaLinkError: an option, the rows, the base or the adapter folder cannot be used.
    """
    config = options.method()
    source = RowSource(options.data, read_columns(options.columns), options.template)
    settings, space = options.training(config), options.search(config)
    from adalink.tools.preflight.training import check_training
    from adalink.training.loop.reporters import check_reporter

    check_reporter(options.report_to)
    head = options.head(source)
    with hub_access(options.base, options.access):
        check_training(
            options.base,
            source,
            options.eval_data,
            options.out,
            device=options.device,
            resume=options.resume,
            wants_head=head is not None,
            problem_type=options.problem_type,
        )
    from adalink.tools.evaluation.metrics import check_installed
    from adalink.tools.evaluation.trained import PAGE_FILE, make_page
    from adalink.tools.terminal.quiet import quiet_libraries
    from adalink.training.run import train

    has_page = True
    try:
        check_installed()
    except BackendUnavailableError as error:
        has_page = False
        say(f"no evaluation page: {error}")
    interrupts, line = Interrupts(), StepLine()
    interrupts.call(lambda: line.say("stopping after this step: its checkpoint is saved; Ctrl-C again stops at once"))
    loop = LoopOptions(
        resume=options.resume,
        progress=line.say,
        show_bar=False,
        on_step=line.show,
        stop=interrupts,
        report_to=options.report_to,
        extra_files=make_page if has_page else lambda outcome: {},
    )
    # Libraries log to stdout, which is for the result.
    log = contextlib.redirect_stdout(io.StringIO() if is_quiet() else sys.stderr)
    with hub_access(options.base, options.access), log, quiet_libraries(), resumable(options.out, line):
        report = train(
            options.base,
            source,
            options.eval_data,
            options.out,
            config,
            settings,
            space=space,
            head=head,
            loop=loop,
            assume_pretokenizer=options.assume_pretokenizer,
        )
    if has_page:
        say(f"evaluation page: {options.out / PAGE_FILE}")
    options.output.give(report, lambda: _show(options.out, report))


def _show(out: Path, report: dict[str, Any]) -> None:
    rows = report["data"]["eval"]["rows"]
    if "evaluation" in report:
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report["evaluation"].items())
        echo(f"adapter {out}: {shown} on {rows} eval rows")
        return
    accuracy = report["exact_match"]
    echo(
        f"adapter {out}: exact match {accuracy['adapter']:.1%} on {rows} eval rows "
        f"(base without it: {accuracy['base']:.1%}); last loss {report['loss_curve'][-1]['loss']:.3f}"
    )
