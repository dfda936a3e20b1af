"""``adalink export kv-cache``."""

from __future__ import annotations

from pathlib import Path

import click

from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import deployment_argument, variant_option
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.console import say
from adalink.tools.terminal.terminal_text import echo


@click.command(cls=Verb, name="kv-cache", short_help="Add a graph with an 8 bit KV cache to a variant.")
@deployment_argument
@variant_option("The variant that gets the graph; the one that runs on the CPU by default.")
@json_options("Print the result as JSON.")
def kv_cache(deployment: Path, variant: str | None, output: JsonOutput) -> None:
    """Add a graph with an 8 bit KV cache to a variant of the base in the deployment DIR.

    A long context then takes a quarter of the memory. Weights are shared, tasks stay as they are, and without
    --kv-cache-dtype the variant runs as before. The ranges of keys and values are measured on seeded tokens.
    'adalink verify' measures what it costs.

    \b
    Example:
      adalink export kv-cache ./deployment --variant int4
      adalink run ./deployment "Hello" --variant int4 --kv-cache-dtype int8
    """  # noqa: D301
    from adalink.export.base.kv_cache import DTYPE, export_kv_cache
    from adalink.runtime.storage.variants import choose_variant

    manifest = export_kv_cache(deployment, variant, progress=say)
    name = choose_variant(manifest, "onnxruntime-cpu", variant)
    graph = manifest.variants[name].kv_cache_graphs[DTYPE]
    result = {
        "deployment": str(deployment),
        "variant": name,
        "kv_cache_dtype": DTYPE,
        "graph": graph,
        "size_bytes": manifest.files[graph].size_bytes,
    }
    output.give(result, lambda: echo(f"{graph}: {manifest.files[graph].size_bytes / 1e3:.0f} kB"))
    say_next("bench", deployment, "--variant", name, "--kv-cache-dtype", DTYPE, output=output)
