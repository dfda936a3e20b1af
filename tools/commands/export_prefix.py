"""``adalink export prefix``."""

from __future__ import annotations

from pathlib import Path

import click

from adalink.runtime.errors import DataError
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import deployment_argument, variant_option
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo

_DTYPES = {"fp32": "float32", "fp16": "float16"}


@click.command(cls=Verb, name="prefix", short_help="Read a text once and add it as a task.")
@deployment_argument
@click.option(
    "--text",
    "text_file",
    required=True,
    type=click.Path(path_type=Path),
    help="The text, UTF-8. It is read as it is, so end it where a prompt is to go on.",
)
@click.option("--name", required=True, help="Name of the task.")
@variant_option("The variant that reads it, and that the task is then for; the one that runs on the CPU by default.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Of the file; fp16 rounds, the base's by default.")
@click.option("--replace", is_flag=True, help="Take the place of a task of the same name.")
@json_options("Print the result as JSON.")
def prefix(
    deployment: Path,
    text_file: Path,
    name: str,
    variant: str | None,
    dtype: str | None,
    replace: bool,
    output: JsonOutput,
) -> None:
    """Read a text once and add its keys and values to the deployment DIR as a task.

    Prompts of the task go on from the text and read nothing of it again. They give what the whole text gives. The
    engine stays as it is. The task is for the variant that read the text, and others refuse it.

    \b
    Example:
      adalink export prefix ./deployment --text manual.txt --name manual
      adalink run ./deployment "Question: How do I reset it? Answer:" --task manual
    """  # noqa: D301
    from adalink.export.adapter.document import export_prefix

    try:
        text = text_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text_file}: cannot be read as UTF-8 text: {error}") from error
    manifest = export_prefix(
        deployment, text, name, variant=variant, dtype=_DTYPES[dtype] if dtype else None, replace=replace
    )
    task = manifest.tasks[name]
    assert task.kv_prefix is not None
    size_bytes = manifest.files[task.weights].size_bytes
    result = {
        "deployment": str(deployment),
        "task": name,
        "tokens": task.kv_prefix.tokens,
        "dtype": task.kv_prefix.dtype,
        "variant_digest": task.kv_prefix.variant_digest,
        "size_bytes": size_bytes,
    }
    output.give(
        result,
        lambda: echo(
            f"task {name} is in {deployment}: KV prefix of {task.prepended_positions} tokens, {size_bytes / 1e6:.1f} MB"
        ),
    )
    say_next(
        "run", deployment, "Question: What is it about? Answer:", "--task", name, "--variant", variant, output=output
    )
