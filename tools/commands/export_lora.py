"""``adalink export lora``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.console import progress_bar, say
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    from adalink.export.lora.base import LoraBase
    from adalink.export.lora.export import Lora
    from adalink.training.models.hub_access import HubAccess

_DTYPES = {"fp32": "float32", "fp16": "float16"}
_FORMATS = ("peft", "gguf")


@click.command(cls=Verb, name="lora", short_help="Export an adapter as a LoRA for other engines and servers.")
@click.argument("adapter", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option(
    "--base", metavar="MODEL", shell_complete=complete_files, help="The base model: folder, GGUF file or hub id."
)
@click.option(
    "--deployment",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A deployment of the base, instead of the model.",
)
@click.option(
    "--format", "form", type=click.Choice(_FORMATS), required=True, help="peft is a folder, gguf a file for llama.cpp."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder or file to write.")
@click.option(
    "--dtype",
    type=click.Choice(list(_DTYPES)),
    default="fp32",
    show_default=True,
    help="Of the LoRA's numbers; fp16 rounds them and halves the size.",
)
@click.option(
    "--untied-base",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write a copy of the GGUF base with a head of its own, which llama.cpp needs where the head is tied.",
)
@hub_options
@click.option("--replace", is_flag=True, help="Take the place of a LoRA, and of a copy, that is there already.")
@json_options("Print the result as JSON.")
def lora(
    adapter: Path,
    base: str | None,
    deployment: Path | None,
    form: str,
    out: Path,
    dtype: str,
    untied_base: Path | None,
    replace: bool,
    access: HubAccess,
    output: JsonOutput,
) -> None:
    """Export ADAPTER, a folder that training wrote, as a LoRA of the base's input embedding.

    On text, an adapter of scope "all" is exactly such a LoRA. PEFT, vLLM and others read the format peft, llama.cpp
    and Ollama read gguf. Every token of the vocabulary is compared with the method before the LoRA is kept. The
    unmodified base runs it: the command refuses what acts elsewhere, such as images, soft prompts and heads.

    \b
    Example:
      adalink export lora ./adapters/topics --base ./SmolLM2-135M-Instruct --format peft --out ./topics-lora
      adalink export lora ./adapters/topics --deployment ./deployment --format peft --out ./topics-lora
      adalink export lora ./adapters/topics --base ./model.gguf --format gguf --out ./topics.gguf
      adalink export lora ./adapters/topics --base ./model.gguf --format gguf --out ./topics.gguf \\
        --untied-base ./model-untied.gguf
    """  # noqa: D301
    from adalink.export.lora.export import export_lora

    with progress_bar() as progress:
        lora_base = _open_base(base, deployment, access)
        written = export_lora(
            adapter,
            lora_base,
            out,
            form,
            dtype=_DTYPES[dtype],
            untied_base=untied_base,
            replace=replace,
            progress=progress,
        )
    result = {
        "adapter": str(adapter),
        "base": lora_base.name,
        "fingerprint": lora_base.contract.fingerprint,
        "format": form,
        "out": str(out),
        "dtype": written.dtype,
        "tokens": written.tokens,
        "rank": written.rank,
        "alpha": written.alpha,
        "size_bytes": written.size_bytes,
        "worst_ratio": written.worst_ratio,
        "untied_base": None if untied_base is None else str(untied_base),
    }
    output.give(result, lambda: _show(out, lora_base, written, form, untied_base))
    if form == "gguf" and untied_base is None and lora_base.gguf is None and lora_base.is_tied is not False:
        say(
            "llama.cpp needs a GGUF file whose head has a matrix of its own; of a model whose head is tied, "
            "--base MODEL.gguf --untied-base FILE writes one"
        )


def _open_base(model: str | None, deployment: Path | None, access: HubAccess) -> LoraBase:
    from adalink.export.lora.base import base_of_checkpoint, base_of_deployment

    if (model is None) == (deployment is None):
        raise click.UsageError("give one of --base and --deployment")
    if deployment is not None:
        return base_of_deployment(deployment)
    from adalink.tools.terminal.quiet import quiet_libraries
    from adalink.training.models.hub_access import hub_access

    assert model is not None
    with hub_access(model, access), quiet_libraries():
        return base_of_checkpoint(model)


def _show(out: Path, base: LoraBase, written: Lora, form: str, untied_base: Path | None) -> None:
    size = f"rank {written.rank}, {written.size_bytes / 1e6:.1f} MB"
    echo(f"{out} is a LoRA of the input embedding for {base.name}: {size}")
    echo(f"  {written.tokens} tokens agree with the method: {written.worst_ratio:.2g} of the bound for {written.dtype}")
    if untied_base is not None:
        echo(f"  {untied_base} is {base.name} with a head of its own: run that")
    if form == "gguf":
        model = untied_base or base.gguf or "MODEL.gguf"
        echo(f"  llama-server --model {model} --lora {out}")
    else:
        echo(f'  PeftModel.from_pretrained(model, "{out}")')
