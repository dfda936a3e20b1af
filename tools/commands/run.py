"""``adalink run``: generate text with a deployment, or hidden states with an encoder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import DataError
from adalink.runtime.request import check_text
from adalink.runtime.rows.source import RowSource, read_columns
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.sampling.structured_output import StructuredOutput
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    deployment_argument,
    engine_options,
    gpu_layers_option,
    is_typed,
    kv_cache_option,
    make_options,
    map_option,
    require_rows,
    rows_option,
    sampling_options,
    task_option,
    template_option,
    typed_options,
)
from adalink.tools.command_line.verb import Verb
from adalink.tools.rows.answers import embed_rows, encode_rows, generate_rows
from adalink.tools.rows.conversations import is_rows, read_conversations
from adalink.tools.rows.prompt_rows import BadRows
from adalink.tools.rows.prompt_rows import PromptRow as PromptRow
from adalink.tools.rows.rows import read_rows as read_rows
from adalink.tools.terminal.terminal_text import echo_generated

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment

# Options of `SamplingParams`; the second group only chooses what is sampled from.
_SAMPLING = (
    *("temperature", "seed", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    *("presence_penalty", "frequency_penalty", "logit_bias"),
)
_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of ``adalink run``.

    Attributes:
        deployment: the folder.
        text: the prompt; or else
        text_file: the file that holds it; or else
        jsonl: rows with prompts, whose ``columns`` and ``template`` are as in ``RowSource``; or else
        messages: a conversation, or rows with conversations. Without any of the four, the prompt is standard input.
        images: images of the one prompt.
        text_pair: second text of the one prompt, for encoders.
        on_error: ``"stop"`` or ``"skip"``: what a bad row of ``jsonl`` does.
        task: the task; ``None`` for the base model. Rows may name another.
        backend: the engine's backend.
        variant: variant of the base; see ``Deployment.open``.
        threads: threads of the engine.
        kv_cache_dtype: dtype of the KV cache; see ``Deployment.open``.
        gpu_layers: see ``Deployment.open``.
        full_check: read every file again.
        output: where results go as JSON.
        settings: the other arguments of ``Deployment.generate``.
    """

    deployment: Path
    text: str | None
    text_file: Path | None
    jsonl: Path | None
    columns: tuple[str, ...]
    template: str | None
    messages: Path | None
    images: tuple[Path, ...]
    text_pair: str | None
    on_error: str
    task: str | None
    backend: str
    variant: str | None
    threads: int | None
    kv_cache_dtype: str | None
    gpu_layers: int | None
    full_check: bool
    output: JsonOutput
    settings: Mapping[str, Any]

    @property
    def has_rows(self) -> bool:
        """Whether the input is a file with a prompt or conversation a line."""
        return self.jsonl is not None or (self.messages is not None and is_rows(self.messages))


def _biases(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[int, float] | None:
    """Token ids and their numbers; raises ``click.BadParameter``."""
    biases = {}
    for value in values:
        try:
            token, number = value.split("=")
            biases[int(token)] = float(number)
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: expected a token id and a number, such as 7=-2.5") from error
    return biases or None


@click.command(cls=Verb, short_help="Generate text, or hidden states, with a deployment.")
@deployment_argument
@click.argument("text", required=False)
@click.option(
    "--file", "text_file", type=click.Path(path_type=Path, dir_okay=False), help="Read the prompt from a file."
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="An image for the prompt's next placeholder, such as <image>. May be repeated.",
)
@rows_option(
    "Rows with prompt, task, images, text_pair or messages, as JSONL, JSON, CSV, TSV or Parquet; - for JSONL from "
    "standard input. Paths of images start at the file's folder."
)
@map_option
@template_option
@click.option(
    "--messages",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A conversation in the model's chat template, as JSON in the form of OpenAI's API; .jsonl: one a line.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="A bad row of a file: answer nothing, or answer the others and exit with 2.",
)
@click.option("--text-pair", metavar="TEXT", help="The second text of a pair, for encoders.")
@task_option("The task; the base model without it. Rows of a file may name their own.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Tokens at most; by default the base's own limit, else 64.",
)
@sampling_options
@click.option("--repetition-penalty", type=float, help="Above 1, tokens of the prompt and text get less likely.")
@click.option("--presence-penalty", type=float, help="Above 0, generated tokens get less likely; -2 to 2.")
@click.option("--frequency-penalty", type=float, help="The same for each time that they occurred.")
@click.option(
    "--logit-bias",
    multiple=True,
    metavar="ID=NUMBER",
    callback=_biases,
    help="Add a number, -100 to 100, to the logit of a token id. May be repeated.",
)
@click.option(
    "--json-schema",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The text is JSON of the schema in this file; needs the extra `structured`.",
)
@click.option("--regex", metavar="TEXT", help="The text matches this regular expression; likewise.")
@click.option("--no-repeat-ngram-size", type=int, help="N-grams of this size occur once, prompt included; 0 is off.")
@click.option("--min-new-tokens", type=int, help="No end token before so many new tokens.")
@click.option("--ignore-generation-config", is_flag=True, help="Nothing by default from the base's generation config.")
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End at this text, instead of the base's own stop texts. May be repeated.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--draft-tokens",
    type=click.IntRange(min=0),
    help="Speculative decoding of a single prompt: most draft tokens verified in one forward pass; 0 turns it off. By "
    "default 8 in float32, and 0 where it might change the text.",
)
@engine_options
@kv_cache_option
@gpu_layers_option
@click.option("--full-check", is_flag=True, help="Read every file again, also those known to be unchanged.")
@json_options("Print one JSON line for each result.")
def command(**values: Any) -> None:
    """Generate text from TEXT, a file, standard input, or a file of rows, with the deployment in DIR.

    On a terminal the text appears as it is generated. A file's or standard input's last line end is not part of the
    prompt, and a byte order mark at its start is not either. An encoder prints the mean of its last hidden states as
    JSON instead.

    \b
    Example:
      adalink run ./deployment "The capital of France is"
      printf 'Text: oil prices rose again\\nTopic:' | adalink run ./deployment --task topics
      cat letter.txt | adalink run ./deployment --chat --max-new-tokens 200
      adalink run ./deployment --messages chat.json
      adalink run ./deployment --rows rows.jsonl --task topics > answers.jsonl
      adalink run ./deployment --rows rows.csv --template "Text: {text} Topic:" --task topics > answers.jsonl
      adalink run ./deployment "<image> What is this?" --image cat.jpg
    """  # noqa: D301
    options = make_options(RunOptions, values, rest="settings")
    run(options)
    say_next("serve", options.deployment, output=options.output)


def run(options: RunOptions) -> None:
    """Answer the prompts on stdout.

    Raises:
        click.UsageError: options that exclude each other.
        AdaLinkError: a prompt, or the deployment, cannot be used.
    """
    from adalink.runtime.deployment import Deployment
    from adalink.tools.preflight.deployment import check_deployment, check_row_tasks

    sources = (options.text, options.text_file, options.jsonl, options.messages)
    if sum(source is not None for source in sources) > 1:
        raise click.UsageError("give one of TEXT, --file, --rows and --messages")
    if options.images and (options.jsonl or options.messages) is not None:
        raise click.UsageError("--image is for one prompt: name the images of --rows or --messages in its rows")
    if not options.has_rows and is_typed("on_error"):
        raise click.UsageError("--on-error is for the rows of --rows and --messages: leave it out")
    if options.text_pair is not None and (options.jsonl or options.messages) is not None:
        raise click.UsageError("--text-pair is for one prompt: name the pairs of --rows in its rows")
    require_rows(options.jsonl is not None, "columns", "template")
    bad = BadRows(skip=options.on_error == "skip" and options.has_rows)
    if options.jsonl is not None:
        source = RowSource(options.jsonl, read_columns(options.columns), options.template)
        rows = read_rows(source, options.task, bad)
    elif options.messages is not None:
        rows = read_conversations(options.messages, options.task, bad)
    else:
        prompt = _prompt(options.text, options.text_file)
        rows = [PromptRow(prompt, options.task, options.images, text_pair=options.text_pair)]
    manifest = check_deployment(
        options.deployment, [options.task], backend=options.backend, variant=options.variant, nested=True
    )
    rows = check_row_tasks(manifest, rows, lambda row, error: bad.add(row.line, error))
    with Deployment.open(
        options.deployment,
        options.backend,
        variant=options.variant,
        threads=options.threads,
        full_check=options.full_check,
        kv_cache_dtype=options.kv_cache_dtype,
        gpu_layers=options.gpu_layers,
    ) as opened:
        if opened.manifest.base.kind == "encoder":
            _print_states(opened, rows, bad, options)
        else:
            _print_texts(opened, rows, bad, options)
    bad.finish()


def _print_states(deployment: Deployment, rows: list[PromptRow], bad: BadRows, options: RunOptions) -> None:
    if unused := typed_options(options.settings):
        raise click.UsageError(
            f"{unused[0]} is for generating, and {deployment.manifest.base.name} is an encoder: leave it out"
        )
    rows, encoded = encode_rows(deployment, rows, bad)
    with options.output.lines() as json_line:
        for entry in bad.among(rows, embed_rows(deployment, rows, encoded)):
            echo_generated(json_line(entry))


def _print_texts(deployment: Deployment, rows: list[PromptRow], bad: BadRows, options: RunOptions) -> None:
    settings = dict(options.settings)
    settings["sampling"] = _sampling(deployment, settings)
    settings["stop"] = settings["stop"] or None  # the base's own
    settings["structured"] = _structured(settings.pop("json_schema"), settings.pop("regex"))
    rows, encoded = encode_rows(deployment, rows, bad, chat=settings.pop("chat"), new_tokens=settings["max_new_tokens"])
    ids = [row_ids for row_ids, _ in encoded]
    is_plain = not options.has_rows and not options.output.on_stdout
    streaming = is_plain and sys.stdout is not None and sys.stdout.isatty()
    answers = generate_rows(deployment, rows, ids, _write if streaming else None, settings)
    with options.output.lines() as json_line:
        for entry in bad.among(rows, answers):
            line = json_line(entry)
            if streaming:
                click.echo()
            else:
                echo_generated(entry["text"] if is_plain else line)


def _sampling(deployment: Deployment, settings: dict[str, Any]) -> SamplingParams:
    """Sampling parameters, taken out of ``settings``; raises ``click.UsageError`` for one that would have no effect."""
    values = {name: settings.pop(name) for name in (*_SAMPLING, *_FILTERS)}
    params = SamplingParams(**values, base_defaults=not settings.pop("ignore_generation_config"))
    base = deployment.manifest.base
    is_greedy = params.resolve(base.generation, base.vocab_size).temperature == 0
    if is_greedy and (unused := typed_options(_FILTERS)):
        raise click.UsageError(f"{unused[0]} needs a --temperature above 0: the likeliest token is taken without one")
    return params


def _structured(schema: Path | None, regex: str | None) -> StructuredOutput | None:
    """What the texts must be; raises ``DataError`` for a file that cannot be read."""
    if schema is not None and regex is not None:
        raise click.UsageError("give one of --json-schema and --regex")
    if regex is not None:
        return StructuredOutput(regex=regex)
    return None if schema is None else StructuredOutput(json_schema=_read(schema))


def _prompt(text: str | None, path: Path | None) -> str:
    if text is not None:
        return check_text(text, "TEXT")
    if path is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no prompt: give TEXT, --file, --rows, or text on standard input")
    read = _read(path)
    return check_text(read, "standard input" if path is None else str(path)).removesuffix("\n")


def _read(path: Path | None) -> str:
    """The text of a file, or of standard input; raises ``DataError``."""
    try:
        return sys.stdin.read().removeprefix("\ufeff") if path is None else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path or 'standard input'}: cannot be read as UTF-8 text: {error}") from error


def _write(row: int, piece: str) -> None:
    echo_generated(piece, nl=False)
