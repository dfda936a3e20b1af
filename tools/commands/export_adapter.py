"""``adalink export adapter``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.adapter_spec import show_rank
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import SAMPLE_TEXT, say_next, verb_for_texts
from adalink.tools.command_line.options import out_option
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.console import say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Manifest

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SECONDS_BETWEEN_LINES = 2.0
# More tasks than this are counted instead of listed.
_MOST_LISTED = 20


@click.command(cls=Verb, name="adapter", short_help="Export adapters as tasks of a deployment.")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@out_option("The deployment folder.")
@click.option("--name", help="Name of the task, for one adapter; the adapter folder's by default.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the task's input; the base's by default.")
@click.option(
    "--fold",
    type=click.Choice(["table"]),
    help="Also compute the task ahead for every token: all adapted embeddings, for engines with an embedding table.",
)
@click.option("--assume-base", is_flag=True, help="You know that a PEFT folder was trained for this very base.")
@click.option("--replace", is_flag=True, help="Take the place of tasks of the same name.")
@json_options("Print the result as JSON.")
def adapter(
    adapters: tuple[Path, ...],
    out: Path,
    name: str | None,
    dtype: str | None,
    fold: str | None,
    assume_base: bool,
    replace: bool,
    output: JsonOutput,
) -> None:
    """Export each ADAPTER, a folder that training or PEFT wrote, as a task of a deployment.

    The adapters must belong to the deployment's base. All are added in one change, or none. No byte under base/ or
    engines/ is touched. --fold table is for adapters of text alone, and for engines with an external embedding table:
    the command prints what each token gains and what it takes. For engines that take LoRA see export lora.

    Of PEFT's methods, those that act at the input or on the initial KV cache can be exported: prompt tuning, P-tuning,
    CPT, prefix tuning, cartridges, and LoRA of the input embedding. Such a folder does not say which weights it was
    trained for: --assume-base says that you know.

    \b
    Example:
      adalink export adapter ./adapters/topics --out ./deployment
      adalink export adapter ./adapters/* --out ./deployment
      adalink export adapter ./adapters/topics-2 --out ./deployment --name topics --replace
      adalink export adapter ./adapters/topics --out ./deployment --fold table
      adalink export adapter ./peft/prompt-tuned --out ./deployment --assume-base
    """  # noqa: D301
    from adalink.export.adapter.export import export_adapters
    from adalink.tools.bench.fold_tradeoff import fold_trade

    folders = _by_name(adapters, name)
    shown = time.monotonic()

    def progress(done: int, task: str) -> None:
        nonlocal shown
        if time.monotonic() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            say(f"{done} of {len(folders)} adapters checked; next: {task}")

    manifest = export_adapters(
        folders,
        out,
        dtype=DTYPES[dtype] if dtype else None,
        replace=replace,
        fold=fold,
        assume_base=assume_base,
        progress=progress,
    )
    # On a backend that is not here nothing can be timed; the files are the same.
    can_run = fold is not None and manifest.base.embedding_dtype != "bfloat16"
    trade = fold_trade(out, manifest, next(iter(folders))) if can_run else None
    result: dict[str, object] = {"deployment": str(out), "tasks": [_described(manifest, task) for task in folders]}
    if trade is not None:
        result["fold_trade"] = trade
    output.give(result, lambda: _show(out, manifest, list(folders), trade))
    first = next(iter(folders))
    say_next(_verb(manifest, first), out, SAMPLE_TEXT, "--task", first, output=output)


def _show(out: Path, manifest: Manifest, tasks: list[str], trade: dict[str, float] | None) -> None:
    for task in tasks[:_MOST_LISTED]:
        entry = manifest.tasks[task]
        soft = f", soft prompt of {entry.soft_tokens}" if entry.soft_tokens else ""
        if entry.kv_prefix is not None:
            soft = f", KV prefix of {entry.kv_prefix.tokens}{soft}"
        method = f"rank {show_rank(entry.rank)}, {entry.activation}" + (", by token id" if entry.input == "ids" else "")
        echo(f"task {task} is in {out}: {method}{soft}, scope {entry.scope}")
        echo(f"  {entry.graph}, {manifest.size_bytes((entry.graph,)) / 1e3:.1f} kB, {entry.adapter_digest}")
        if entry.head is not None:
            kind = entry.head.problem_type.replace("_", " ")
            echo(f"  {entry.head_graph}: {kind}, {len(entry.head.labels)} labels; adalink classify gives them")
    if len(tasks) > _MOST_LISTED:
        echo(f"and {len(tasks) - _MOST_LISTED} more; {len(manifest.tasks)} tasks are in {out}")
    fold = manifest.tasks[tasks[0]].fold
    if trade is not None and fold is not None:
        echo(
            f"folded ({fold.kind}): {trade['fold_bytes'] / 1e6:.2f} MB beside {trade['weights_bytes'] / 1e3:.0f} kB of "
            f"weights; one token takes {trade['fold_us']:.1f} µs, through the graph {trade['graph_us']:.1f} µs"
        )


def _verb(manifest: Manifest, task: str) -> str:
    """The verb that answers by a task."""
    if manifest.tasks[task].head is not None or manifest.tasks[task].labels is not None:
        return "classify"
    return verb_for_texts(manifest.base)


def _by_name(adapters: tuple[Path, ...], name: str | None) -> dict[str, Path]:
    if name is not None and len(adapters) > 1:
        raise click.BadParameter(f"{name!r} is one name for {len(adapters)} adapters", param_hint="--name")
    from adalink.runtime.storage.manifest_validation import check_task_name

    folders: dict[str, Path] = {}
    for folder in adapters:
        task = folder.resolve().name if name is None else name
        if name is None:
            try:
                check_task_name(task)
            except DeploymentError as error:
                raise click.BadParameter(f"{folder}: {error}; name it with --name", param_hint="ADAPTER") from error
        if task in folders:
            raise click.BadParameter(
                f"{folders[task]} and {folder} would both be task {task!r}: rename one, or export it apart with --name",
                param_hint="ADAPTER",
            )
        folders[task] = folder
    return folders


def _described(manifest: Manifest, task: str) -> dict[str, object]:
    from adalink.tools.commands.inspect import describe_task

    entry = manifest.tasks[task]
    return {
        "task": task,
        "graph": entry.graph,
        **describe_task(manifest, entry),
    }
