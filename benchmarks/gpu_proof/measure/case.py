"""One backend on one deployment: opening, deviation from PyTorch, prompts, decode steps, mixed batches, swaps.

Any backend can be measured: on ``onnxruntime-cpu`` a rehearsal tries these lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from msgspec import structs

from adalink.runtime.deployment import Deployment
from adalink.runtime.device import cuda
from adalink.runtime.engine import Backend
from adalink.runtime.options import OpenOptions
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.tools.common.observed_backend import ObservedBackend
from benchmarks.gpu_proof.measure.timing import in_turns, microseconds, milliseconds
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan

MOST_RATIO, MOST_SWAP_US = 1.01, 20.0
SWAPS = 10_000
_STEPS, _ROUNDS = 32, 15
_PROMPT = 128


class Case:
    """An open deployment whose passes are timed; its tasks are ``task-00000`` and so on."""

    def __init__(self, record: Record, plan: Plan, folder: Path, backend: Backend) -> None:
        """Open it; ``open_seconds`` and the profile are reported."""
        self._record, self._plan = record, plan
        self._starts: list[float] = []
        self._rounds, self._steps, self._prompt = (_ROUNDS, _STEPS, _PROMPT) if plan.is_full else (3, 6, 24)
        begun = time.perf_counter()
        manifest = read_manifest(folder)
        # No token ends a generation before its budget, and each is the likeliest.
        manifest = structs.replace(manifest, base=structs.replace(manifest.base, eos_token_ids=(), generation=None))
        observed = ObservedBackend(backend, lambda: self._starts.append(time.perf_counter()))
        options = OpenOptions(choose_variant(manifest, backend.name))
        self.deployment = Deployment(folder, manifest, observed, options)
        self._tasks = self.deployment.tasks
        record.figure("open_seconds", time.perf_counter() - begun)
        record.figure("profile", str(self.deployment.profile))

    def first_token(self, share: float) -> None:
        """Milliseconds from a prompt to its first token, without and with a task."""
        sides = {
            "base": lambda: self._timed([self._ids(0)], None, 1),
            "task": lambda: self._timed([self._ids(0)], self._tasks[0], 1),
        }
        found = in_turns(sides, self._rounds, share * self._plan.seconds_left)
        self._record.figure(f"first_token_{self._prompt}", milliseconds(found, "base"))

    def decode(self, rows: int, share: float) -> None:
        """Milliseconds of a decode step: the base, one task for all rows, and a task for each row."""
        prompts = [self._ids(row) for row in range(rows)]
        mixed = [self._tasks[row % len(self._tasks)] for row in range(rows)]
        sides: dict[str, Callable[[], float]] = {
            "base": lambda: self._step(prompts, None),
            "task": lambda: self._step(prompts, self._tasks[0]),
        }
        if rows > 1:
            sides["mixed"] = lambda: self._step(prompts, mixed)
        found = milliseconds(in_turns(sides, self._rounds, share * self._plan.seconds_left), "base")
        fastest = found["task_ms"]
        self._record.figure(f"decode_{rows}", found | {"tokens_per_second_with_task": 1e3 * rows / fastest})
        self._record.target(f"decode of {rows} with a task over without", found["task_ratio"], MOST_RATIO)

    def mixed_answers(self, rows: int) -> None:
        """Rows of a mixed batch whose tokens are those of the row alone; in float16 a few may differ by rounding."""
        prompts = [self._ids(row)[:12] for row in range(rows)]
        mixed = [None if row % 5 == 4 else self._tasks[row % len(self._tasks)] for row in range(rows)]
        together = self.deployment.generate(prompts, tasks=mixed, max_new_tokens=8, draft_tokens=0)
        checked = range(0, rows, 1 if rows <= 8 else 4)
        alone = {
            row: self.deployment.generate([prompts[row]], tasks=mixed[row], max_new_tokens=8, draft_tokens=0)[0]
            for row in checked
        }
        same = sum(together[row].token_ids == alone[row].token_ids for row in checked)
        distinct = len({result.token_ids for result in together})
        self._record.figure("mixed_rows", {"rows": rows, "checked": len(checked), "as_alone": same, "texts": distinct})

    def swaps(self, share: float, host: Callable[[int], object]) -> None:
        """A swap: what the host does, 10,000 times; and requests that follow another task's or their own.

        Args:
            share: of the time that is left.
            host: gives a batch another loaded task, by the number of the swap, and does nothing else.
        """
        seconds = share * self._plan.seconds_left
        found = microseconds(host, SWAPS if self._plan.is_full else 200, seconds / 3)
        self._record.figure("swap_host", found)
        self._record.target("host time of a swap, microseconds", found["us_p50"], MOST_SWAP_US)
        prompt, taken = [self._ids(1)[:4]], {"swapped": list[float](), "same": list[float]()}
        for name in self._tasks[:2]:
            self.deployment.generate(prompt, tasks=name, max_new_tokens=2, draft_tokens=0)
        ends, swaps = time.monotonic() + seconds * 2 / 3, 0
        with counted_records() as recorded:
            while swaps < (SWAPS if self._plan.is_full else 20) and time.monotonic() < ends:
                for side in taken:
                    taken[side].append(self._timed(prompt, self._tasks[swaps % 2], 2))
                swaps += 1
        medians = {f"{side}_request_us_p50": 1e6 * float(np.median(times)) for side, times in taken.items() if times}
        self._record.figure("swap_requests", {"swaps": swaps, "recorded": recorded[0], **medians})
        self._record.target(f"steps recorded anew over {swaps} swaps", recorded[0], 0)

    def receipt(self) -> None:
        """What was built, and whether the base is unchanged."""
        receipt = self.deployment.receipt()
        self._record.figure("receipt", {"engine_builds": receipt.engine_builds, "unchanged": receipt.unchanged})

    def _timed(self, prompts: list[list[int]], tasks: str | list[str] | None, steps: int) -> float:
        begun = time.perf_counter()
        self.deployment.generate(prompts, tasks=tasks, max_new_tokens=steps, draft_tokens=0)
        return time.perf_counter() - begun

    def _step(self, prompts: list[list[int]], tasks: str | list[str] | None) -> float:
        self._starts.clear()
        self._timed(prompts, tasks, self._steps)
        # The first interval holds the prompt.
        return float(np.median(np.diff(np.array(self._starts, np.float64))[1:]))

    def _ids(self, seed: int) -> list[int]:
        size = self.deployment.manifest.base.vocab_size
        ids: list[int] = np.random.default_rng(seed).integers(3, size, self._prompt).tolist()
        return ids


@contextmanager
def counted_records() -> Iterator[list[int]]:
    """Count the decode steps that become CUDA graphs while the block runs."""
    right, count = cuda.CudaQueue.record, [0]

    def record(self: cuda.CudaQueue, work: Callable[[], None]) -> Callable[[], None] | None:
        replay = right(self, work)
        count[0] += replay is not None
        return replay

    cuda.CudaQueue.record = record  # type: ignore[method-assign]
    try:
        yield count
    finally:
        cuda.CudaQueue.record = right  # type: ignore[method-assign]
