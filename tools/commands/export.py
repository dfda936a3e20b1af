"""``adalink export`` and ``adalink export base``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import SAMPLE_TEXT, say_next, verb_for_texts
from adalink.tools.command_line.options import assume_pretokenizer_option, out_option
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import VerbGroup
from adalink.tools.commands.export_adapter import DTYPES, adapter
from adalink.tools.commands.export_engine import engine
from adalink.tools.commands.export_genai import genai
from adalink.tools.commands.export_kv_cache import kv_cache
from adalink.tools.commands.export_lora import lora
from adalink.tools.commands.export_prefix import prefix
from adalink.tools.commands.export_web import web
from adalink.tools.terminal.console import say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Manifest, Variant, Vision
    from adalink.training.models.hub_access import HubAccess

_LLAMA_CPP = "llama.cpp"
_QUANTIZATIONS = ("int4", "int8", "gguf")
_TARGETS = ("portable", "onnxruntime-cpu", "onnxruntime-cuda", _LLAMA_CPP)


@click.group(cls=VerbGroup, name="export", short_help="Export a base model, adapters and engines into a deployment.")
def command() -> None:
    """Export a base model, adapters and engines into a deployment.

    The base is exported once. Each adapter is then a graph of some 100 kB beside it; adding or replacing one
    touches no byte of the base, nor of an engine that was built from it.

    \b
    Example:
      adalink export base ./SmolLM2-135M-Instruct --out ./deployment
      adalink export adapter ./adapters/topics --out ./deployment
      adalink export engine ./deployment --backend tensorrt-rtx --target sm86
    """  # noqa: D301


command.add_command(adapter)
command.add_command(engine)
command.add_command(kv_cache)
command.add_command(genai)
command.add_command(lora)
command.add_command(prefix)
command.add_command(web)


@command.command(name="base", short_help="Export a checkpoint as the base of a deployment.")
@click.argument("model", shell_complete=complete_files)
@out_option("The deployment folder.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp32", show_default=True, help="Of the weights.")
@click.option(
    "--target",
    type=click.Choice(_TARGETS),
    default="onnxruntime-cpu",
    show_default=True,
    help="What the graph is for; portable has standard ONNX operators only. llama.cpp runs a GGUF file as it is. Each "
    "target is one variant of the base.",
)
@click.option(
    "--quantize",
    "quantization",
    type=click.Choice(_QUANTIZATIONS),
    help="Store the matrices in 4 or 8 bits: a variant of that name, beside others or alone. gguf keeps the codes that "
    "a GGUF file has.",
)
@click.option(
    "--modality", "modalities", multiple=True, help="A modality beside text that embeddings may have; may be repeated."
)
@assume_pretokenizer_option
@hub_options
@click.option("--replace", is_flag=True, help="Write a variant again that is there already.")
@click.option("--copy", is_flag=True, help="With --target llama.cpp: copy the file where it could be linked.")
@json_options("Print the result as JSON.")
def base(
    model: str,
    out: Path,
    dtype: str,
    target: str,
    quantization: str | None,
    modalities: tuple[str, ...],
    assume_pretokenizer: str | None,
    replace: bool,
    copy: bool,
    access: HubAccess,
    output: JsonOutput,
) -> None:
    """Export MODEL as the base of a deployment.

    MODEL is a Hugging Face folder, a GGUF file (or a folder with one) or a hub id. The graph takes inputs_embeds, so
    nothing of any task is inside it. Run it again with another --target or with --quantize to add a variant;
    adapters stay as they are. 'adalink verify --variant int4' measures what quantising costs.

    \b
    Example:
      adalink export base ./SmolLM2-135M-Instruct --out ./deployment
      adalink export base ./SmolLM2-135M-Instruct --out ./deployment --target portable
      adalink export base ./SmolLM2-135M-Instruct --out ./deployment --quantize int4
      adalink export base ./SmolLM2-135M-Instruct.Q4_0.gguf --out ./deployment --quantize gguf
      adalink export base ./SmolLM2-135M-Instruct.Q4_0.gguf --out ./deployment --target llama.cpp
    """  # noqa: D301
    from adalink.export.base.export import export_base
    from adalink.export.base.request import check_model, check_place, check_settings
    from adalink.tools.terminal.quiet import quiet_libraries
    from adalink.training.models.hub_access import hub_access
    from adalink.training.models.loading import load_tokenizer

    check_settings(DTYPES[dtype], target, quantization, ("text", *modalities))
    check_place(out, quantization or target, replace=replace)
    with hub_access(model, access):
        check_model(model, out)
        with quiet_libraries():
            assumed = None  # the checkpoint brings its own
            if assume_pretokenizer is not None:
                assumed = load_tokenizer(model, assume_pretokenizer=assume_pretokenizer)
            manifest = export_base(
                model,
                out,
                dtype=DTYPES[dtype],
                target=target,
                quantization=quantization,
                modalities=("text", *modalities),
                replace=replace,
                copy=copy,
                tokenizer=assumed,
                progress=say,
            )
    variant = manifest.variants[quantization or target]
    vision = manifest.base.vision
    result: dict[str, object] = {
        "deployment": str(out),
        "base": manifest.base.name,
        "fingerprint": manifest.base.fingerprint,
        "variant": quantization or target,
        "target": target,
        "dtype": manifest.base.embedding_dtype,
        "graph": variant.graph,
        "size_bytes": manifest.size_bytes(variant.files),
    }
    if manifest.base.unused_tensors:
        result["unused_tensors"] = list(manifest.base.unused_tensors)
    if vision is not None:
        result["vision"] = {"graph": vision.graph, "size_bytes": manifest.size_bytes(vision.files)}
    output.give(result, lambda: _show(out, manifest, variant))
    against = ("--against", model, "--revision", access.revision)
    say_next(*_next(out, manifest, quantization or target, against), output=output)


def _show(out: Path, manifest: Manifest, variant: Variant) -> None:
    vision = manifest.base.vision
    echo(f"{manifest.base.name} ({manifest.base.architecture}, {manifest.base.embedding_dtype}) is in {out}")
    echo(f"  {variant.graph}, {manifest.size_bytes(variant.files) / 1e6:.1f} MB, for {', '.join(variant.backends)}")
    if vision is not None:
        echo(
            f"  {vision.graph}, {manifest.size_bytes(vision.files) / 1e6:.1f} MB, gives {vision.tokens_per_image} "
            f"positions {_unit(vision)}"
        )
    echo(f"  fingerprint {manifest.base.fingerprint}")
    if manifest.base.unused_tensors:
        echo(f"  left out of the checkpoint: {', '.join(manifest.base.unused_tensors)}")


def _next(out: Path, manifest: Manifest, variant: str, against: tuple[object, ...]) -> tuple[object, ...]:
    """What to do with a base; a further form of it, or one that has tasks, is verified first."""
    if (backends := manifest.variants[variant].backends) == (_LLAMA_CPP,):
        return "verify", out, *against, "--backend", *backends, "--variant", variant
    if len(manifest.variants) > 1 or variant != "onnxruntime-cpu":
        return "verify", out, *against, "--variant", variant
    if manifest.tasks:
        return "verify", out, *against
    return verb_for_texts(manifest.base), out, SAMPLE_TEXT


def _unit(vision: Vision) -> str:
    """What gives as many positions as the manifest says."""
    if vision.patches is not None:
        height, width = vision.image_size
        return f"for {height} x {width} pixels of an image"
    return "an image" if vision.tiles is None else "a tile of an image"
