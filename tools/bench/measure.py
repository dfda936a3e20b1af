"""The cost of a task beside the base model, in one process (docs/concepts/parity.md, "benchmark")."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import DeploymentError
from adalink.runtime.options import OpenOptions
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.common.observed_backend import ObservedBackend
from adalink.tools.parity.inputs.prompts import PROMPTS, fit

PREFILL_TOKENS = 64
MIXED_TASKS = 32
_PREFILL_ROUNDS = 15
# Short rounds: both sides run at the same clock speed, beside the same other programs.
_DECODE_ROUNDS, _DECODE_STEPS = 60, 12
_MIXED_ROUNDS, _MIXED_STEPS, _MIXED_PROMPT_TOKENS = 10, 10, 16
_QUICK_SHARE = 4
_SWITCHES = 2000
_LOADS = 15
_COPIES = 32

Metric = dict[str, object]
# For each side, the times of each turn.
Samples = dict[str, list[list[float]]]
# Name of a side -> what it passes as ``tasks``.
Sides = Mapping[str, str | Sequence[str | None] | None]


class Bench:
    """An open deployment to measure; its generations do not end before their budget.

    Attributes:
        model: name of the base.
        task: the task that is measured.
        tokens: length of the prompt.
        rows: rows of the mixed batch.
    """

    def __init__(
        self, path: Path, task: str | None, backend: str, threads: int | None, options: OpenOptions | None = None
    ) -> None:
        """Open the deployment; ``options`` say with which variant of its base and which KV cache.

        Raises:
            DeploymentError: it has no task, or not that one.
            BackendError: the backend cannot be used.
        """
        manifest = read_manifest(path)
        if not manifest.tasks:
            raise DeploymentError(f"{path} has no task to measure: add one with 'adalink export adapter'")
        self.task = sorted(manifest.tasks)[0] if task is None else task
        if self.task not in manifest.tasks:
            names = ", ".join(sorted(manifest.tasks))
            raise DeploymentError(f"{path} has no task {self.task!r} to measure; it has {names}")
        # No end, and the likeliest token: every side and round does the same work.
        base = msgspec.structs.replace(manifest.base, eos_token_ids=(), generation=None)
        endless = msgspec.structs.replace(manifest, base=base)
        # The time from one pass to the next is a whole decode step: engine, choice of the token, lookup and adaptation.
        self._starts: list[float] = []
        opened = open_backend(backend, threads, None if options is None else options.gpu_layers)
        observed = ObservedBackend(opened, lambda: self._starts.append(time.perf_counter()))
        self._deployment = Deployment(path, endless, observed, options)
        self._base = manifest.base
        self.model = manifest.base.name
        self._folder = (path / manifest.tasks[self.task].graph).parent
        self._files = [path / file for file in manifest.tasks[self.task].files]
        longest = (self._base.max_positions or PREFILL_TOKENS * 2) - _DECODE_STEPS
        longest -= manifest.tasks[self.task].prepended_positions
        self.tokens = min(PREFILL_TOKENS, longest)
        self._share = 1
        profile = self._deployment.profile
        self.rows = MIXED_TASKS if profile is None else min(MIXED_TASKS, profile.batch.max)
        self._generates = self._base.kind != "encoder" and self._base.tokenizer is not None

    def close(self) -> None:
        """Close the deployment."""
        self._deployment.close()

    def measure(self, progress: Callable[[str], None], *, quick: bool = False) -> tuple[list[Metric], dict[str, float]]:
        """Measure everything.

        Args:
            progress: called with a line at each step.
            quick: a quarter of the rounds, for an impression; no ``task_bytes``, which only a fresh process can tell.

        Returns:
            The metrics, and the median of each side in milliseconds. A ratio is the median over the turns.
        """
        medians: dict[str, float] = {}
        metrics: list[Metric] = []
        self._share = _QUICK_SHARE if quick else 1

        def ratio(name: str, samples: Samples) -> None:
            # Each turn gives one ratio of two adjacent measurements, so a drift of the machine affects both.
            base, task = (np.array([np.median(turn) for turn in turns]) for turns in samples.values())
            times = zip(samples, (base, task), strict=True)
            medians.update({f"{name}_{side}_ms": 1e3 * float(np.median(values)) for side, values in times})
            metrics.append(_metric(f"{name}_ratio", float(np.median(task / base)), "1"))

        with _quiet_collector():
            # First: further tasks could later fill memory that other measurements have freed.
            growth = None if quick else self._memory_growth()
            progress("cold load")
            load = self._load_times()
            progress(f"prefill of {self.tokens} tokens")
            ratio("prefill", self._prefill())
            if self._generates:
                progress("decode")
                ratio("decode", self._decode())
            progress("switching tasks")
            switches = self._switch_times()
            metrics.append(_metric("swap_hot_us_p50", 1e6 * float(np.percentile(switches, 50)), "us"))
            metrics.append(_metric("swap_hot_us_p99", 1e6 * float(np.percentile(switches, 99)), "us"))
            metrics.append(_metric("task_load_ms", 1e3 * float(np.median(load)), "ms"))
            progress(f"mixed batch of {self.rows} tasks")
            ratio("mixed_batch", self._mixed())
            if growth is not None:
                metrics.append(_metric("task_bytes", growth, "bytes"))
        return metrics, medians

    def _prefill(self) -> Samples:
        ids = np.random.default_rng(0).integers(0, self._base.vocab_size, (1, self.tokens))
        return self._alternate({"base": None, "task": self.task}, ids)

    def _alternate(self, sides: Sides, ids: Array) -> Samples:
        """Whole sequences through the engine, the sides taking turns."""
        samples: Samples = {name: [] for name in sides}
        for turn in range(-2, _PREFILL_ROUNDS // self._share):
            for name in _order(sides, turn):
                start = time.perf_counter()
                self._deployment.run(input_ids=ids, tasks=sides[name])
                if turn >= 0:
                    samples[name].append([time.perf_counter() - start])
        return samples

    def _decode(self) -> Samples:
        return self._steps_of(
            {"base": None, "task": self.task}, [self._prompt(self.tokens)], _DECODE_ROUNDS, _DECODE_STEPS
        )

    def _prompt(self, tokens: int) -> str:
        return fit(" ".join(PROMPTS), self._deployment.tokenizer.encode, tokens)

    def _mixed(self) -> Samples:
        """A batch whose rows have one task each, against the same batch with one task for all."""
        copies = [self._deployment.add_task(self._folder, f"copy-{index}") for index in range(self.rows)]
        try:
            sides: Sides = {"single": copies[0], "mixed": copies}
            if self._generates:
                prompts = [self._prompt(_MIXED_PROMPT_TOKENS)] * self.rows
                return self._steps_of(sides, prompts, _MIXED_ROUNDS, _MIXED_STEPS)
            shape = (self.rows, self.tokens)
            return self._alternate(sides, np.random.default_rng(1).integers(0, self._base.vocab_size, shape))
        finally:
            for name in copies:
                self._deployment.remove_task(name)

    def _steps_of(self, sides: Sides, prompts: list[str], rounds: int, steps: int) -> Samples:
        """Decode steps, the sides taking turns; the first round warms up."""
        samples: Samples = {name: [] for name in sides}
        for turn in range(-1, rounds // self._share):
            for name in _order(sides, turn):
                self._starts.clear()
                self._deployment.generate(prompts, tasks=sides[name], max_new_tokens=steps, draft_tokens=0)
                if turn >= 0:
                    # The first interval holds the prefill.
                    samples[name].append(np.diff(self._starts)[-(steps - 2) :].tolist())
        return samples

    def _switch_times(self) -> list[float]:
        """Switch between two loaded tasks and adapt the embedding of one token."""
        other = self._deployment.add_task(self._folder, "switch-other")
        ids = np.array([[self._base.vocab_size // 2]])
        times = []
        for index in range(-100, _SWITCHES):
            name = (self.task, other)[index % 2]
            start = time.perf_counter()
            self._deployment.input_embeddings(ids, tasks=name)
            if index >= 0:
                times.append(time.perf_counter() - start)
        self._deployment.remove_task(other)
        return times

    def _load_times(self) -> list[float]:
        """Load the task from the disk, its files dropped from the page cache where the system lets us."""
        times = []
        for index in range(-1, _LOADS):
            for file in self._files:
                _drop_from_cache(file)
            start = time.perf_counter()
            self._deployment.load_task(self.task)
            if index >= 0:
                times.append(time.perf_counter() - start)
            self._deployment.unload_task(self.task)
        self._deployment.load_task(self.task)
        return times

    def _memory_growth(self) -> float | None:
        """Resident memory that one more loaded task takes; ``None`` where the system does not say."""
        ids = np.array([[0]])

        def add(count: int, prefix: str) -> list[str]:
            names = [self._deployment.add_task(self._folder, f"{prefix}-{index}") for index in range(count)]
            for name in names:
                self._deployment.input_embeddings(ids, tasks=name)
            return names

        names = add(_COPIES // 4, "warm-up")  # what only the first tasks allocate
        before = _resident_bytes()
        if before is not None:
            names += add(_COPIES, "memory")
        after = _resident_bytes()
        for name in names:
            self._deployment.remove_task(name)
        if before is None or after is None:
            return None
        return max(0, after - before) / _COPIES


def _metric(name: str, value: float, unit: str) -> Metric:
    return {"name": name, "value": value, "unit": unit}


def _order(sides: Mapping[str, object], turn: int) -> list[str]:
    """The sides in alternating order, so that a drift of the machine favours neither."""
    names = list(sides)
    return names if turn % 2 == 0 else names[::-1]


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep Python's garbage collector out of the measurement."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _drop_from_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
