"""What each way costs: bytes of a task, memory of 4, 40 and 400 tasks, time of one text under all four tasks."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from adalink.export.adapter.export import export_adapters
from adalink.runtime import Deployment
from adalink.runtime.storage.adapter import CONFIG_FILE, WEIGHTS_FILE, make_adapter, read_adapter
from adalink.training.adapter_io import save_adapter

COUNTS = (4, 40, 400)
_ROUNDS, _WARM = 60, 5


def adapter_bytes(folder: Path) -> int:
    """Bytes of an adapter: weights and configuration."""
    return sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))


def deployment_bytes(folder: Path) -> int:
    """Bytes of a whole deployment, which a task needs where it has a model of its own."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def add_similar_tasks(adapters: Sequence[Path], count: int, deployment: Path, work: Path) -> None:
    """``count`` tasks in a deployment: the adapters in turn, each with weights of its own by seeded noise."""
    folders = {}
    for number in range(count):
        adapter, rng = read_adapter(adapters[number % len(adapters)]), np.random.default_rng(number)
        weights = {
            name: (weight * (1 + 1e-3 * rng.standard_normal(weight.shape))).astype(np.float32)
            for name, weight in adapter.weights.items()
        }
        folders[f"task-{number:03}"] = work / f"task-{number:03}"
        save_adapter(folders[f"task-{number:03}"], make_adapter(adapter.config, weights, origin="a similar task"))
    export_adapters(folders, deployment)


def memory_bytes(deployments: Sequence[Path]) -> int:
    """Resident memory of a new process with these deployments open, after a text under each of their tasks."""
    command = [sys.executable, "-m", "examples.classifiers.memory", *map(str, deployments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["resident_bytes"])


def memory_of_tasks(plain: Path, adapters: Sequence[Path], work: Path) -> dict[str, dict[str, Any]]:
    """Memory of 4, 40 and 400 tasks on one encoder, all measured.

    Args:
        plain: a deployment of the encoder without tasks.
        adapters: adapter folders, which give the tasks their shapes.
        work: a folder that is made, and removed afterwards.
    """
    memory = {}
    for count in COUNTS:
        shutil.copytree(plain, work / "deployment")
        add_similar_tasks(adapters, count, work / "deployment", work / "adapters")
        memory[str(count)] = {"bytes": memory_bytes([work / "deployment"]), "measured": True}
        shutil.rmtree(work)
    return memory


def memory_of_models(models: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Memory of 4 and 40 tasks with a model each, measured, and of 400, calculated from these two."""
    few, many = (memory_bytes([models[number % len(models)] for number in range(count)]) for count in COUNTS[:2])
    each = (many - few) / (COUNTS[1] - COUNTS[0])
    measured = {
        str(count): {"bytes": value, "measured": True} for count, value in zip(COUNTS, (few, many), strict=False)
    }
    return measured | {str(COUNTS[2]): {"bytes": round(many + each * (COUNTS[2] - COUNTS[1])), "measured": False}}


def latencies(kit: Path, tasks: Sequence[str], models: Mapping[str, Sequence[Path]], text: str) -> dict[str, float]:
    """Milliseconds for one text under all tasks, one thread, medians of alternating rounds.

    Args:
        kit: a deployment with each task, and each as ``TASK-head``, its head alone.
        tasks: names of the tasks.
        models: method -> deployments with a model each, in the order of ``tasks``.
        text: the text.
    """
    with ExitStack() as stack:
        one = stack.enter_context(Deployment.open(kit, threads=1))
        ways: dict[str, Callable[[], Any]] = {
            "adalink": lambda: one.classify([text] * len(tasks), list(tasks)),
            "head": lambda: one.classify([text] * len(tasks), [f"{task}-head" for task in tasks]),
            "embedding": lambda: one.encode([text], pooling="mean", normalize=True),
        }
        for method, folders in models.items():
            opened = [stack.enter_context(Deployment.open(folder, threads=1)) for folder in folders]
            names = [deployment.tasks[0] for deployment in opened]
            ways[method] = lambda opened=opened, names=names: [  # type: ignore[misc]  # defaults bind the loop's values
                deployment.classify([text], name) for deployment, name in zip(opened, names, strict=True)
            ]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(_WARM + _ROUNDS):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                if number >= _WARM:
                    times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}
