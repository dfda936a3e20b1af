"""One backend on one machine: cost of building, opening, switching tasks, prompts and steps; deviation from PyTorch.

Prints a JSON object in its last line. Any backend can be named; on ``onnxruntime-cpu`` it shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.device import cuda
from adalink.runtime.device.adapter_weights import AdapterWeightPools
from adalink.runtime.device.protocols import Device
from adalink.runtime.options import OpenOptions
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import COMPILED_BACKENDS, choose_variant
from adalink.runtime.tasks.registry import TaskRegistry
from adalink.tools.common.observed_backend import ObservedBackend

PROFILE = "batch=1:8:32,seq=1:128:1024,past=0:512:2047"
BATCHES, PROMPTS = (1, 8, 32), (128, 1024)
_STEPS, _ROUNDS, _SWITCHES = 32, 9, 10_000
_QUICK = 3
Json = dict[str, object]


def main() -> None:
    """Measure one backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--against", required=True, help="the checkpoint, for parity")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    options = parser.parse_args()
    result: dict[str, Any] = {"backend": options.backend}
    if options.backend in COMPILED_BACKENDS:
        result |= build(options.deployment, options.backend)
    recorded = [0]
    with counted_records(recorded):
        started = time.perf_counter()
        starts: list[float] = []
        manifest = read_manifest(options.deployment)
        # No token ends a generation before its budget, and each is the likeliest.
        manifest = structs.replace(manifest, base=structs.replace(manifest.base, eos_token_ids=(), generation=None))
        backend = ObservedBackend(open_backend(options.backend), lambda: starts.append(time.perf_counter()))
        form = choose_variant(manifest, backend.name)
        with Deployment(options.deployment, manifest, backend, OpenOptions(form)) as deployment:
            result["open_seconds"] = time.perf_counter() - started
            result["parity"] = parity(deployment, options.against)
            bench = Case(deployment, starts, options.quick)
            result["first_token"] = bench.first_token()
            result["decode"] = bench.decode()
            before = recorded[0]
            result["swap"] = bench.switches() | {"steps_recorded_during_swaps": recorded[0] - before}
            if options.backend in COMPILED_BACKENDS:
                result["swap"] |= host_switch(deployment, options.backend, cuda.CudaDevice(options.backend))
            receipt = deployment.receipt()
            result["receipt"] = {
                "engine_builds": receipt.engine_builds,
                "builder_calls_of_this_process": receipt.builder_calls,
                "base_unchanged": receipt.unchanged,
                "steps_recorded": recorded[0],
            }
    print(json.dumps(result))


class Case:
    """An open deployment whose passes are timed; its tasks are ``task-00000`` and ``task-00001``."""

    def __init__(self, deployment: Deployment, starts: list[float], quick: bool) -> None:
        self._deployment = deployment
        self._starts = starts
        self._rounds = _QUICK if quick else _ROUNDS
        self._switches = 50 if quick else _SWITCHES
        profile = deployment.profile
        most = BATCHES[-1] if profile is None else profile.batch.max
        self._batches = [batch for batch in BATCHES if batch <= most][: 2 if quick else None]
        self._prompts = PROMPTS[: 1 if quick else None]
        self._tasks = deployment.tasks[:2]

    def first_token(self) -> Json:
        """Milliseconds from a prompt to its logits, without and with a task in turns, and the ratio of each pair."""
        return {
            str(length): self._ratio(lambda task, length=length: self._timed(1, length, 1, task))  # type: ignore[misc]
            for length in self._prompts
        }

    def decode(self) -> Json:
        """Milliseconds a step after a prompt of 128 tokens, by batch."""
        steps: Json = {}
        for batch in self._batches:
            row = self._ratio(lambda task, batch=batch: self._step(batch, task))  # type: ignore[misc]
            row["tokens_per_second_with_task"] = 1e3 * batch / row["task_ms"]
            steps[str(batch)] = row
        return steps

    def switches(self) -> Json:
        """Each task in turn, two requests of three tokens: the first follows the other task, the second its own."""
        prompt = [self._ids(4)]
        for task in self._tasks:  # both are loaded, and the second one is the last that ran
            self._deployment.generate(prompt, tasks=task, max_new_tokens=3)
        times: dict[str, list[float]] = {"swapped": [], "same": []}
        for index in range(self._switches):
            for side in times:
                begun = time.perf_counter()
                self._deployment.generate(prompt, tasks=self._tasks[index % 2], max_new_tokens=3)
                times[side].append(time.perf_counter() - begun)
        medians = {f"{side}_request_us_p50": 1e6 * float(np.median(np.array(each))) for side, each in times.items()}
        return {"swaps": self._switches, **medians}

    def _ratio(self, measure: Callable[[str | None], float]) -> dict[str, float]:
        sides: dict[str, list[float]] = {"base": [], "task": []}
        for turn in range(-1, self._rounds):
            order = list(zip(sides, (None, self._tasks[0]), strict=True))
            for side, name in order if turn % 2 == 0 else order[::-1]:
                value = measure(name)
                if turn >= 0:
                    sides[side].append(value)
        base, task = (np.array(values) for values in sides.values())
        return {
            "base_ms": 1e3 * float(np.median(base)),
            "task_ms": 1e3 * float(np.median(task)),
            "ratio": float(np.median(task / base)),
        }

    def _timed(self, batch: int, length: int, steps: int, task: str | None) -> float:
        begun = time.perf_counter()
        self._deployment.generate([self._ids(length)] * batch, tasks=task, max_new_tokens=steps, draft_tokens=0)
        return time.perf_counter() - begun

    def _step(self, batch: int, task: str | None) -> float:
        self._starts.clear()
        self._timed(batch, PROMPTS[0], _STEPS, task)
        # The first interval holds the prompt.
        intervals = np.diff(np.array(self._starts, np.float64))
        return float(np.median(intervals[1:]))

    def _ids(self, length: int) -> list[int]:
        size = self._deployment.manifest.base.vocab_size
        ids: list[int] = np.random.default_rng(length).integers(3, size, length).tolist()
        return ids


def host_switch(deployment: Deployment, backend: str, device: Device) -> Json:
    """What the host does to give a batch another loaded task, and nothing else: 10,000 times, microseconds.

    It is given no queue to wait for: from the task's name to the number that the embedder reads.
    """
    tasks = TaskRegistry(deployment.path, deployment.manifest, open_backend(backend))
    bank = AdapterWeightPools(device, deployment.manifest.base.hidden_size, 256, 64)
    names, times = deployment.tasks[:2], []
    for index in range(-100, _SWITCHES):
        begun = time.perf_counter()
        bank.reserve(tasks.resolve(names[index % 2], 1), 1).release()
        if index >= 0:
            times.append(time.perf_counter() - begun)
    bank.close()
    return {f"host_us_p{rank}": 1e6 * float(np.percentile(times, rank)) for rank in (50, 99)}


def build(deployment: Path, backend: str) -> Json:
    """Build the engine for this GPU; how long and how large."""
    from adalink.export.engine.export import export_engine
    from adalink.runtime.trt.record import read_record

    begun = time.perf_counter()
    manifest: Manifest = export_engine(deployment, backend, profile=PROFILE, replace=True)
    seconds = time.perf_counter() - begun
    variant = manifest.variants[backend]
    record = read_record((deployment / variant.graph).parent)
    return {
        "build_seconds": record.build_seconds,
        "build_seconds_with_fronts": seconds,
        "plan_bytes": record.plan_bytes,
        "engine_bytes": manifest.size_bytes(variant.files),
        "profile": str(record.profile),
        "cache": record.cache,
        "target": list(record.target),
        "version": record.version,
    }


def parity(deployment: Deployment, against: str) -> Json:
    """Logits of real prompts against PyTorch in float32, on the same GPU where PyTorch sees one."""
    import torch

    from adalink.tools.parity.prompts import choose_prompts
    from adalink.training.adapter_io import load_adapter
    from adalink.training.models.loading import load_base

    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base(against).to(place)
    rows = [deployment.tokenizer.encode(text) for text in choose_prompts(quick=True)]
    deviations: Json = {"reference": f"PyTorch {torch.__version__}, float32, {place}"}
    for task in (None, *deployment.tasks[:2]):
        worst, agreeing, total = 0.0, 0, 0
        for ids in rows:
            logits = deployment.run(input_ids=[ids], tasks=task)["logits"][0].astype(np.float32)
            with torch.no_grad():
                if task is None:
                    expected = model(input_ids=torch.tensor([ids], device=place)).logits[0].float().cpu().numpy()
                else:
                    folder = (deployment.path / deployment.manifest.tasks[task].config).parent
                    with load_adapter(folder, model):
                        expected = model(input_ids=torch.tensor([ids], device=place)).logits[0].float().cpu().numpy()
            worst = max(worst, float(np.abs(logits - expected).max()))
            agreeing += int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
            total += len(ids)
        deviations[task or "base"] = {"largest_deviation": worst, "top1_agreeing": agreeing, "positions": total}
    return deviations


@contextmanager
def counted_records(count: list[int]) -> Iterator[None]:
    """Count the decode steps that become CUDA graphs while the block runs."""
    right = cuda.CudaQueue.record

    def record(self: cuda.CudaQueue, work: Callable[[], None]) -> Callable[[], None] | None:
        replay = right(self, work)
        count[0] += replay is not None
        return replay

    cuda.CudaQueue.record = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        cuda.CudaQueue.record = right  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
