"""``adalink export engine``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import deployment_argument, task_option, variant_option
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.console import progress_bar, say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Manifest
    from adalink.runtime.trt.record import EngineRecord

_BACKENDS = ("tensorrt", "tensorrt-rtx")


@click.command(cls=Verb, name="engine", short_help="Build a TensorRT engine of a deployment's base.")
@deployment_argument
@click.option("-b", "--backend", required=True, type=click.Choice(_BACKENDS), help="The library that will run it.")
@click.option(
    "--target",
    default="current",
    show_default=True,
    metavar="GPUS",
    help="GPUs it is for: current (the one in this machine), portable, or for tensorrt-rtx names with commas between, "
    "such as sm86,sm89; those need no GPU here.",
)
@click.option(
    "--profile",
    metavar="SIZES",
    help="Shapes it takes, SMALLEST:LIKELIEST:LARGEST each, as in batch=1:4:8,seq=1:128:512,past=0:512:4095, and "
    "images=1:1:4 at a time for a base that takes some; what is left out has a default.",
)
@click.option("--name", help="Name of the variant; the backend's without it.")
@variant_option("The portable variant it is built from; without it, the one there is.")
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=complete_files,
    help="The base model: its portable graph is exported first, where there is none yet.",
)
@task_option("A task whose own graph is built too, for other programs; may be repeated.", "tasks", multiple=True)
@click.option("--replace", is_flag=True, help="Build an engine again that is there already.")
@json_options("Print the result as JSON.")
def engine(
    deployment: Path,
    backend: str,
    target: str,
    profile: str | None,
    name: str | None,
    variant: str | None,
    model: str | None,
    tasks: tuple[str, ...],
    replace: bool,
    output: JsonOutput,
) -> None:
    """Build a TensorRT engine of the base of the deployment DIR.

    It is built from the portable base graph, unmodified by any task, together with small engines that adapt its input
    for every task there is or will be: adding a task later builds nothing. Of a base that takes images the vision
    tower is built beside it. TensorRT builds on the GPU that will run the engine; TensorRT-RTX builds for other GPUs
    too, on a machine that has none.

    \b
    Example:
      adalink export base ./SmolLM2-135M-Instruct --out ./deployment --target portable --dtype fp16
      adalink export engine ./deployment --backend tensorrt
      adalink export engine ./deployment --backend tensorrt --model ./SmolLM2-135M-Instruct
      adalink export engine ./deployment --backend tensorrt-rtx --target sm86,sm89
      adalink export engine ./deployment --backend tensorrt-rtx --profile batch=1:1:4,past=0:256:1023 --replace
    """  # noqa: D301
    from msgspec import to_builtins

    from adalink.export.engine.export import export_engine
    from adalink.runtime.trt.record import read_record

    if model is not None:
        _add_portable_graph(deployment, model, backend, name or backend, tasks, replace=replace)
    with progress_bar() as progress:
        manifest = export_engine(
            deployment,
            backend,
            target=[part.strip() for part in target.split(",")],
            profile=profile,
            name=name,
            variant=variant,
            tasks=tasks,
            replace=replace,
            progress=progress,
        )
    variant_name = name or backend
    built = manifest.variants[variant_name]
    record = read_record((deployment / built.graph).parent)
    result = {
        "deployment": str(deployment),
        "variant": variant_name,
        "backend": backend,
        "version": record.version,
        "target": list(record.target),
        "profile": str(record.profile),
        "cache": record.cache,
        "plan": built.graph,
        "plan_sha256": manifest.files[built.graph].sha256,
        "plan_bytes": record.plan_bytes,
        "size_bytes": manifest.size_bytes(built.files),
        "build_seconds": record.build_seconds,
        "vision": to_builtins(record.vision),
        "tasks": sorted(record.tasks),
    }
    output.give(result, lambda: _show(deployment, manifest, variant_name, record))
    say_next("bench", deployment, "--backend", backend, "--variant", variant_name, output=output)


def _show(deployment: Path, manifest: Manifest, name: str, record: EngineRecord) -> None:
    built = manifest.variants[name]
    echo(f"{manifest.base.name} is an engine {name!r} in {deployment}")
    echo(
        f"  {built.graph}, {record.plan_bytes / 1e6:.1f} MB, built in {record.build_seconds:.1f} s by {record.backend} "
        f"{record.version} for {', '.join(record.target)}"
    )
    if record.vision is not None:
        echo(
            f"  {built.vision_graph}, the vision tower, {record.vision.plan_bytes / 1e6:.1f} MB, built in "
            f"{record.vision.build_seconds:.1f} s"
        )
    echo(f"  profile {record.profile}")
    echo(f"  {len(record.embedders)} embedders, for every task of rank {record.embedder_rank} or less")


def _add_portable_graph(
    deployment: Path, model: str, backend: str, engine: str, tasks: Sequence[str], *, replace: bool
) -> None:
    """Export the portable graph of a deployment's base, where it has none; what the engine needs is checked before.

    Raises:
        AdaLinkError: the engine cannot be built, or the model is not that of the deployment.
    """
    from adalink.export.base.export import export_base
    from adalink.export.base.request import check_model
    from adalink.export.engine.request import check_request, has_portable
    from adalink.runtime.storage.manifest_io import read_manifest
    from adalink.runtime.trt.api import load_api
    from adalink.tools.terminal.quiet import quiet_libraries

    manifest = read_manifest(deployment)
    load_api(backend)
    check_request(manifest, engine, tasks, replace=replace)
    if has_portable(manifest):
        return
    check_model(model, deployment)
    base = manifest.base
    with quiet_libraries():
        export_base(
            model,
            deployment,
            dtype=base.embedding_dtype,
            target="portable",
            modalities=base.modalities,
            progress=say,
        )
