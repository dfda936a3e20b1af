"""``adalink bench``: what a task costs beside the base model."""

from __future__ import annotations

from pathlib import Path

import click

from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.options import (
    deployment_argument,
    engine_options,
    gpu_layers_option,
    kv_cache_option,
    task_option,
)
from adalink.tools.command_line.verb import Verb


@click.command(cls=Verb, short_help="Measure what a task costs beside the base model.")
@deployment_argument
@task_option("The task to measure; the first by name without it.")
@engine_options
@kv_cache_option
@gpu_layers_option
@json_options("Print the report as JSON.")
def command(
    deployment: Path,
    task: str | None,
    backend: str,
    variant: str | None,
    threads: int | None,
    kv_cache_dtype: str | None,
    gpu_layers: int | None,
    output: JsonOutput,
) -> None:
    """Measure what a task costs beside the base model, with the deployment in DIR.

    With and without the task take turns in one process, after a warm-up, with Python's garbage collector off. A ratio
    is the median over the turns, which a drift of the machine affects less than the two times. An engine whose profile
    takes fewer than 32 rows is measured with as many as it takes. Close other programs first.

    The names in the JSON. prefill_ratio: a prompt of 64 tokens. decode_ratio: from one engine call to the next.
    swap_hot_us: switch between two loaded tasks and adapt one token. task_load_ms: read, check and open a task whose
    files have left the page cache. mixed_batch_ratio: a decode step of 32 rows with 32 tasks against one task.
    task_bytes: resident memory that one more task takes. open_ratio: opening the deployment against creating ONNX
    Runtime's session of the same graph. import_ms: the runtime beyond numpy and onnxruntime (both on onnxruntime-cpu
    alone).

    \b
    Example:
      adalink bench ./deployment --task topics --json-file bench.json
    """  # noqa: D301
    from adalink.tools.preflight.deployment import check_deployment

    check_deployment(deployment, [task], backend=backend, variant=variant)
    from adalink.runtime.options import OpenOptions
    from adalink.tools.bench.measure import Bench
    from adalink.tools.bench.startup import measure_startup
    from adalink.tools.bench.terminal import print_report
    from adalink.tools.common.environment import describe_environment
    from adalink.tools.terminal.console import say

    say("opening the deployment")
    options = OpenOptions(variant, kv_cache_dtype=kv_cache_dtype, gpu_layers=gpu_layers)
    bench = Bench(deployment, task, backend, threads, options)
    try:
        metrics, medians = bench.measure(say)
        environment = {
            **describe_environment(),
            "backend": backend,
            "variant": variant,
            "threads": threads,
            "kv_cache_dtype": kv_cache_dtype,
            "gpu_layers": gpu_layers,
            "model": bench.model,
            "task": bench.task,
            "prompt_tokens": bench.tokens,
            "medians_ms": medians,
            "method": "interleaved, warmed up, medians, garbage collector off",
        }
    finally:
        bench.close()
    if backend == "onnxruntime-cpu":
        say("start-up")
        metrics += measure_startup(deployment, threads, variant)
    output.give(
        {"environment": environment, "metrics": metrics},
        lambda: print_report(f"{bench.model}, task {bench.task}", metrics, medians, bench.tokens, bench.rows),
    )
    say_next("serve", deployment, "--variant", variant, output=output)
