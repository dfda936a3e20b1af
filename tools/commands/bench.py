"""``adalink bench``: what a task costs beside the base model."""

from __future__ import annotations

from pathlib import Path

import click

from adalink.tools.common.options import engine_options
from adalink.tools.common.report_file import ReportFile, write_json


@click.command(short_help="Measure what a task costs beside the base model.")
@click.argument("deployment", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--task", metavar="NAME", help="The task to measure; the first by name without it.")
@engine_options
@click.option("--json", "json_file", type=ReportFile(), help="Also write a JSON report.")
def command(
    deployment: Path, task: str | None, backend: str, variant: str | None, threads: int | None, json_file: Path | None
) -> None:
    """Measure what a task costs beside the base model, with the deployment in DIR.

    With and without the task take turns in one process, after a warm-up, with Python's garbage collector off; each
    ratio is one of medians. prefill_ratio: a prompt of 64 tokens. decode_ratio: from one engine call to the next.
    swap_hot_us: switch between two loaded tasks and adapt one token. task_load_ms: read, check and open a task whose
    files have left the page cache. mixed_batch_ratio: a decode step of 32 rows with 32 tasks against one task.
    task_bytes: resident memory that one more task takes. open_ratio: opening the deployment against creating ONNX
    Runtime's session of the same graph. import_ms: the runtime beyond numpy and onnxruntime (both on onnxruntime-cpu
    alone). An engine whose profile takes fewer than 32 rows is measured with as many as it takes. Close other programs
    first.

    \b
    Example:
      adalink bench ./deployment --task topics --json bench.json
    """  # noqa: D301
    from adalink.tools.preflight.deployment import check_deployment

    check_deployment(deployment, [task], backend=backend, variant=variant)
    from adalink.tools.bench.measure import Bench
    from adalink.tools.bench.startup import measure_startup
    from adalink.tools.common.console import print_table, say
    from adalink.tools.common.environment import describe_environment

    say("opening the deployment")
    bench = Bench(deployment, task, backend, threads, variant)
    try:
        metrics, medians = bench.measure(say)
        environment = {
            **describe_environment(),
            "backend": backend,
            "variant": variant,
            "threads": threads,
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
    rows = [(metric["name"], f"{metric['value']:.4g}", metric["unit"]) for metric in metrics]
    print_table(f"{bench.model}, task {bench.task}", ("metric", "value", "unit"), rows)
    print_table("Medians", ("", "ms"), [(name, f"{value:.3f}") for name, value in medians.items()])
    if json_file is not None:
        write_json(json_file, {"environment": environment, "metrics": metrics})
