"""``adalink run``: generate text with a deployment, or hidden states with an encoder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.request import check_text
from adalink.tools.common.options import is_given

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment

_BATCH_ROWS = 8
_FIELDS = ("prompt", "task", "images")


class PromptRow(NamedTuple):
    """A prompt, the task that answers it, the images in it, and its file and line if it has one."""

    prompt: str
    task: str | None
    images: tuple[Path, ...] = ()
    origin: str | None = None


@click.command(short_help="Generate text, or hidden states, with a deployment.")
@click.argument("deployment", metavar="DIR", type=click.Path(path_type=Path))
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
@click.option(
    "--jsonl",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Rows {"prompt", "task", "images"}, as batches; paths of images start at the file\'s folder.',
)
@click.option("--task", metavar="NAME", help="The task; the base model without it. Rows of --jsonl may name their own.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, help="Sample from the k likeliest tokens; with --temperature.")
@click.option(
    "--top-p", type=float, help="Sample from the likeliest tokens of this total probability; with --temperature."
)
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End at this text. May be repeated.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--draft-tokens",
    type=click.IntRange(min=0),
    help="Most guesses checked at once for a single prompt; 8 in float32 without it, none where that might change "
    "the text. 0 for none.",
)
@click.option("--backend", default="onnxruntime-cpu", show_default=True, help="Which engine.")
@click.option("--variant", metavar="NAME", help="Which form of the base, such as int4; not a quantised one by default.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--full-check", is_flag=True, help="Read every file again, also those known to be unchanged.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line for each result.")
def command(
    deployment: Path,
    text: str | None,
    text_file: Path | None,
    images: tuple[Path, ...],
    jsonl: Path | None,
    task: str | None,
    backend: str,
    variant: str | None,
    threads: int | None,
    full_check: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Generate text from TEXT, a file, standard input, or a file of rows, with the deployment in DIR.

    On a terminal the text appears as it is generated. A file's or standard input's last line end is not part of the
    prompt, and a byte order mark at its start is not either. An encoder prints the mean of its last hidden states as
    JSON instead.

    \b
    Example:
      adalink run ./deployment "The capital of France is"
      printf 'Text: oil prices rose again\\nTopic:' | adalink run ./deployment --task topics
      cat letter.txt | adalink run ./deployment --chat --max-new-tokens 200
      adalink run ./deployment --jsonl rows.jsonl --task topics > answers.jsonl
      adalink run ./deployment "<image> What is this?" --image cat.jpg
    """  # noqa: D301
    from adalink.runtime.deployment import Deployment

    if sum(source is not None for source in (text, text_file, jsonl)) > 1:
        raise click.UsageError("give one of TEXT, --file and --jsonl")
    if images and jsonl is not None:
        raise click.UsageError("--image is for one prompt: name the images of --jsonl in its rows")
    if settings["temperature"] == 0 and (unused := _given({"top_k", "top_p"})):
        raise click.UsageError(f"{unused[0]} needs a --temperature above 0: the likeliest token is taken without one")
    rows = read_rows(jsonl, task) if jsonl is not None else [PromptRow(_prompt(text, text_file), task, images)]
    with Deployment.open(deployment, backend, variant=variant, threads=threads, full_check=full_check) as opened:
        if opened.manifest.base.kind == "encoder":
            if unused := _given(settings):
                raise click.UsageError(
                    f"{unused[0]} is for generating, and {opened.manifest.base.name} is an encoder: leave it out"
                )
            _check_tokens(opened, rows)
            for entry in _embed(opened, rows):
                click.echo(json.dumps(entry))
            return
        if not settings["chat"]:
            _check_tokens(opened, rows)
        streaming = jsonl is None and not as_json and sys.stdout is not None and sys.stdout.isatty()
        for entry in _generate(opened, rows, _write if streaming else None, settings):
            if streaming:
                click.echo()
            elif as_json or jsonl is not None:
                click.echo(json.dumps(entry, ensure_ascii=False))
            else:
                click.echo(entry["text"])


def read_rows(path: Path, task: str | None) -> list[PromptRow]:
    """Prompts, tasks and images of a JSON-lines file.

    Args:
        path: rows ``{"prompt": str, "task": str | null, "images": [path, ...]}``; ``task`` and ``images`` may be left
            out. Paths of images start at the file's folder. Other fields, such as a training row's, are not read,
            but one that is nearly a row's own is refused: the base model would answer a misspelt task.
        task: for rows that name none.

    Raises:
        DataError: a line is not such a row; the message names it.
    """
    rows: list[PromptRow] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}; expected a row with a prompt") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}:{number}: expected {{"prompt": text, "task": name or null}}, received {line[:80]}')
        try:
            check_text(row["prompt"], "prompt")
        except RequestError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        for name in row.keys() - set(_FIELDS):
            if meant := get_close_matches(name.lower(), _FIELDS, 1, cutoff=0.85):
                raise DataError(f"{path}:{number}: field {name!r} is none of a row's: did you mean {meant[0]!r}?")
        own = row.get("task", task)
        if own is not None and not isinstance(own, str):
            raise DataError(f"{path}:{number}: task is {own!r}, expected a name or null")
        images = row.get("images", [])
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise DataError(f"{path}:{number}: images is {str(images)[:80]}, expected a list of paths")
        rows.append(PromptRow(row["prompt"], own, tuple(path.parent / image for image in images), f"{path}:{number}"))
    if not rows:
        raise DataError(f'{path}: holds no rows; expected {{"prompt": text}} on each line')
    return rows


def _given(settings: Container[str]) -> list[str]:
    """The options among ``settings`` that were passed, rather than left at their defaults."""
    options = click.get_current_context().command.params
    return [option.opts[0] for option in options if option.name in settings and is_given(option.name)]


def _prompt(text: str | None, path: Path | None) -> str:
    if text is not None:
        return check_text(text, "TEXT")
    if path is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no prompt: give TEXT, --file, --jsonl, or text on standard input")
    try:
        read = sys.stdin.read().removeprefix("\ufeff") if path is None else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path or 'standard input'}: cannot be read as UTF-8 text: {error}") from error
    return check_text(read, "standard input" if path is None else str(path)).removesuffix("\n")


def _check_tokens(deployment: Deployment, rows: list[PromptRow]) -> None:
    for row in rows:
        if not deployment.tokenizer.encode(row.prompt, len(row.images)):
            raise RequestError(f"{row.origin or 'the prompt'} has no tokens: give it some text")


def _generate(
    deployment: Deployment,
    rows: list[PromptRow],
    stream: Callable[[int, str], None] | None,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """One result for each row, in order; rows of different tasks share a batch."""
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = rows[start : start + _BATCH_ROWS]
        prompts, tasks, images, origins = zip(*batch, strict=True)
        try:
            found = deployment.generate(prompts, images=images, tasks=tasks, stream=stream, **settings)
        except RequestError as error:
            raise RequestError(f"{origins[0]} and on: {error}" if origins[0] else str(error)) from error
        for row, result in zip(batch, found, strict=True):
            seen = {"images": list(map(str, row.images))} if row.images else {}
            yield {"prompt": row.prompt, "task": row.task, **seen, **asdict(result)}


def _embed(deployment: Deployment, rows: list[PromptRow]) -> Iterator[dict[str, Any]]:
    for prompt, task, images, _ in rows:
        ids = deployment.tokenizer.encode(prompt)
        states = deployment.run(input_ids=[ids], images=[images], tasks=task)["last_hidden_state"][0]
        yield {"prompt": prompt, "task": task, "tokens": len(ids), "mean": states.mean(axis=0).tolist()}


def _write(row: int, piece: str) -> None:
    click.echo(piece, nl=False)
