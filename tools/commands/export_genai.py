"""``adalink export genai``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.options import deployment_argument, out_option, task_option, variant_option
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.console import progress_bar, say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from adalink.export.genai.export import GenaiFolder


@click.command(cls=Verb, name="genai", short_help="Export a deployment as a folder for onnxruntime-genai.")
@deployment_argument
@out_option("The folder to write.")
@variant_option("The base variant, one for onnxruntime-cpu; by default one that is not quantised.")
@task_option("A task to take along; all by default. May be repeated.", "tasks", multiple=True)
@click.option("--copy", is_flag=True, help="Copy the weights, even where they could be linked.")
@click.option("--replace", is_flag=True, help="Take the place of such a folder that is there already.")
@json_options("Print the result as JSON.")
def genai(
    deployment: Path,
    out: Path,
    variant: str | None,
    tasks: tuple[str, ...],
    copy: bool,
    replace: bool,
    output: JsonOutput,
) -> None:
    """Export the deployment DIR as a folder for onnxruntime-genai: C, C++, C#, Java and Python.

    The base's graph goes there unmodified. Each task is a file whose tensors a generator takes as inputs, so that
    every generator has a task of its own. The folder is complete. Where the disk has hard links, it takes no space
    for the weights. Tasks with a soft prompt or of scope "prompt" are refused.

    \b
    Example:
      adalink export genai ./deployment --out ./genai
      adalink export genai ./deployment --variant int4 --task topics --out ./genai
    """  # noqa: D301
    from adalink.export.genai.export import export_genai
    from adalink.export.genai.tokenizer import compare_tokenizers

    with progress_bar() as progress:
        written = export_genai(
            deployment, out, variant=variant, tasks=tasks or None, copy=copy, replace=replace, progress=progress
        )
    difference = compare_tokenizers(deployment, out)
    result = {
        "deployment": str(deployment),
        "out": str(out),
        "variant": written.variant,
        "tasks": list(written.tasks),
        "inputs": list(written.inputs),
        "size_bytes": written.size_bytes,
        "linked_bytes": written.linked_bytes,
        "not_carried": written.not_carried,
        "left_out": {task: list(parts) for task, parts in written.left_out.items()},
        "tokenizer_difference": difference,
    }
    output.give(result, lambda: _show(out, written))
    if difference is not None:
        say(difference)
    for task, parts in written.left_out.items():
        say(f"task {task}: {' and '.join(parts)} stay in the kit, and its text is generated without them")
    if written.not_carried:
        settings = ", ".join(f"{name}={value}" for name, value in written.not_carried.items())
        say(f"the base's defaults {settings} are not in {out / 'genai_config.json'}: apply them in your program")


def _show(out: Path, written: GenaiFolder) -> None:
    own = (written.size_bytes - written.linked_bytes) / 1e6
    size = f"{written.size_bytes / 1e6:.1f} MB, {own:.1f} MB of them new"
    echo(f"{out}: variant {written.variant}, {len(written.tasks)} tasks, {size}")
    echo(f"give each generator the tensors {', '.join(written.inputs)}")
    echo(f"  of {out / 'tasks'}/TASK.safetensors, or of {out / 'base.safetensors'} for the base model")
