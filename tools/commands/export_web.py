"""``adalink export web``."""

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
    from adalink.export.web.export import WebFolder


@click.command(cls=Verb, name="web", short_help="Export a deployment as a page for browsers, and for Node.")
@deployment_argument
@out_option("The folder to write.")
@variant_option("The base variant, one for onnxruntime-cpu; by default one that is not quantised.")
@task_option("A task to take along; all by default. May be repeated.", "tasks", multiple=True)
@click.option(
    "--libraries",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="The folder node_modules with onnxruntime-web and @huggingface/tokenizers, for a page that is complete.",
)
@click.option("--replace", is_flag=True, help="Take the place of such a folder that is there already.")
@json_options("Print the result as JSON.")
def web(
    deployment: Path,
    out: Path,
    variant: str | None,
    tasks: tuple[str, ...],
    libraries: Path | None,
    replace: bool,
    output: JsonOutput,
) -> None:
    """Export the deployment DIR as a static folder: a page for browsers, and a module that Node runs too.

    The base's graph goes there unmodified, in pieces of 24 MB with digests. The page loads it once and switches tasks
    in place, with WebGPU where there is one, else with WebAssembly. Any server of static files serves it. Tasks with
    a soft prompt or of scope "prompt" are refused.

    \b
    Example:
      npm install onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
      adalink export web ./deployment --variant int4 --libraries node_modules --out ./site
    """  # noqa: D301
    from adalink.export.web.export import export_web
    from adalink.export.web.libraries import INSTALL

    with progress_bar() as progress:
        written = export_web(
            deployment,
            out,
            variant=variant,
            tasks=tasks or None,
            libraries=libraries,
            replace=replace,
            progress=progress,
        )
    result = {
        "deployment": str(deployment),
        "out": str(out),
        "variant": written.variant,
        "tasks": list(written.tasks),
        "download_bytes": written.download_bytes,
        "libraries": list(written.libraries),
        "not_carried": written.not_carried,
        "left_out": {task: list(parts) for task, parts in written.left_out.items()},
    }
    output.give(result, lambda: _show(out, written))
    if not written.libraries:
        say(f"the page needs two libraries: {INSTALL}, then export with --libraries node_modules; Node needs no copy")
    for task, parts in written.left_out.items():
        say(f"task {task}: {' and '.join(parts)} stay in the kit, and its text is generated without them")
    if written.not_carried:
        settings = ", ".join(f"{name}={value}" for name, value in written.not_carried.items())
        say(f"the base's defaults {settings} are not applied: the page takes the likeliest token, or draws from all")


def _show(out: Path, written: WebFolder) -> None:
    size = f"{written.download_bytes / 1e6:.1f} MB to load"
    echo(f"{out}: variant {written.variant}, {len(written.tasks)} tasks, {size}")
