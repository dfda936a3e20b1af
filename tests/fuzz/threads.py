"""Sixty-four threads on one deployment: every result is, bit for bit, that of a single thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.outcomes import digest

from adalink.runtime.deployment import Deployment

Request = Callable[[Deployment], Any]


def requests(seed: int, count: int, tasks: tuple[str | None, ...]) -> list[Request]:
    """Seeded calls of every kind, with mixed tasks in their rows."""
    rng = np.random.default_rng(seed)
    found: list[Request] = []
    for _ in range(count):
        rows, width = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        ids = rng.integers(3, 96, (rows, width))
        names = [tasks[int(rng.integers(len(tasks)))] for _ in range(rows)]
        prompts = ["".join(chr(97 + int(letter)) for letter in rng.integers(0, 26, width)) for _ in range(rows)]
        match int(rng.integers(3)):
            case 0:
                found.append(lambda opened, ids=ids, names=names: opened.run(input_ids=ids, tasks=names))
            case 1:
                found.append(lambda opened, ids=ids, names=names: opened.input_embeddings(ids, tasks=names))
            case _:
                found.append(
                    lambda opened, prompts=prompts, names=names: [
                        (row.text, list(row.token_ids))
                        for row in opened.generate(prompts, tasks=names, max_new_tokens=6)
                    ]
                )
    return found


def run_threads(folder: Path, *, threads: int = 64, each: int = 20, seed: int = 0) -> dict[str, Any]:
    """Compare many threads with one.

    Args:
        folder: a deployment that generates.
        threads: their number.
        each: requests of each.
        seed: of the requests and of their order.

    Returns:
        Threads, requests, those that differed, and seconds.
    """
    with Deployment.open(folder, threads=1) as opened:
        calls = requests(seed, 2 * each, (None, *opened.tasks))
        alone = [digest(call(opened)) for call in calls]
        differing: list[str] = []
        begun, start = time.monotonic(), threading.Barrier(threads)

        def work(number: int) -> None:
            order = np.random.default_rng([seed, number]).permutation(len(calls))[:each]
            start.wait()
            for index in order:
                try:
                    if digest(calls[index](opened)) != alone[index]:
                        differing.append(f"thread {number}, request {index}: other bits")
                except Exception as error:
                    differing.append(f"thread {number}, request {index}: {type(error).__name__}: {error}")

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return {
        "threads": threads,
        "requests": threads * each,
        "differing": differing,
        "seconds": round(time.monotonic() - begun, 1),
    }
