"""One point of how cost grows, in a separate process: python -m benchmarks.growth --series rank --x 64 ….

Prints prefill_ms (a generation of one token), decode_ms (a step), swap_us (adapt one token, or a batch, under other
tasks than before) and memory_bytes (resident memory that the tasks, or the request, take).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from adalink.runtime.deployment import Deployment
from benchmarks.peers.common import resident_bytes
from benchmarks.prepare import make_prompt
from benchmarks.slopes import BATCH_PROMPT, STEP_PROMPT

_SWITCHES, _STEPS = 1000, 16
_TABLE_ROWS = 16


def measure(path: Path, series: str, x: int, threads: int, repeats: int) -> dict[str, float]:
    """Measure one point.

    Args:
        path: for ``tasks`` a deployment with ``x`` tasks, for ``rank`` one with tasks of rank ``x``, else any with as
            many tasks as the largest batch has rows.
        series: ``tasks``, ``rank``, ``sequence`` or ``batch``.
        x: the number that grows.
        threads: threads of the engine.
        repeats: of each measurement; the median counts.
    """
    rows = x if series == "batch" else 1
    length = {"sequence": x, "batch": BATCH_PROMPT}.get(series, STEP_PROMPT)
    with Deployment.open(path, threads=threads) as deployment:
        names = list(deployment.tasks)
        text = str(make_prompt(deployment.tokenizer, length)["text"])
        tasks = names[:rows]
        # What only the first request takes is not counted as growth; the task of that request is not one of ``names``.
        first_config = path / deployment.manifest.tasks[names[0]].config
        _generate(deployment, ["a"], [deployment.add_task(first_config.parent, "first")], 2)
        deployment.remove_task("first")
        before = resident_bytes()
        for name in names:
            deployment.input_embeddings([[0]], tasks=name)
        loaded = resident_bytes() - before
        if series not in ("tasks", "rank"):
            # Load the base's table and all tasks before the request; systems map more of a file than is read.
            for first in range(0, deployment.manifest.base.vocab_size - _TABLE_ROWS, _TABLE_ROWS):
                deployment.input_embeddings([list(range(first, first + _TABLE_ROWS))])
            before = resident_bytes()
        reset_peak()
        _generate(deployment, [text] * rows, tasks, 1)
        working = peak_bytes() - before
        prefill = _median(lambda: _generate(deployment, [text] * rows, tasks, 1), repeats)
        steps = [
            (_time(lambda: _generate(deployment, [text] * rows, tasks, 1 + _STEPS)) - prefill) / _STEPS
            for _ in range(repeats)
        ]
        switch = _switch_time(deployment, names, rows, length if series == "sequence" else 1)
        memory = loaded / len(names) if series == "rank" else loaded if series == "tasks" else working
    return {
        "prefill_ms": 1e3 * prefill,
        "decode_ms": 1e3 * statistics.median(steps),
        "swap_us": 1e6 * switch,
        "memory_bytes": float(max(memory, 0)),
    }


def _generate(deployment: Deployment, prompts: list[str], tasks: list[str], tokens: int) -> None:
    row_tasks = tasks * (len(prompts) // len(tasks))
    deployment.generate(prompts, tasks=row_tasks, max_new_tokens=tokens, draft_tokens=0)


def _switch_time(deployment: Deployment, names: list[str], rows: int, length: int) -> float:
    """Median seconds to adapt ``(rows, length)`` tokens under random tasks; the weights of many tasks are cold."""
    choose = random.Random(0)
    ids = [[0] * length] * rows
    if len(names) == 1:
        names = names * 2
    draws = [choose.sample(names, rows) if rows > 1 else choose.choice(names) for _ in range(_SWITCHES)]
    limit = time.perf_counter() + 5
    times = []
    for tasks in draws:
        times.append(_time(partial(deployment.input_embeddings, ids, tasks=tasks)))
        if time.perf_counter() > limit:
            break
    return statistics.median(times)


def _median(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(_time(call) for _ in range(repeats))


def _time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def reset_peak() -> None:
    """Let ``peak_bytes`` count from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Measure one point and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, required=True)
    parser.add_argument("--series", choices=("tasks", "rank", "sequence", "batch"), required=True)
    parser.add_argument("--x", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    gc.disable()
    point = measure(arguments.deployment, arguments.series, arguments.x, arguments.threads, arguments.repeats)
    print(json.dumps(point), flush=True)


if __name__ == "__main__":
    main()
