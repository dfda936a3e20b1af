"""``make bench``: measure the kit, its peers and how cost grows; write results, a table and plots.

python -m benchmarks.run [--quick]. Every result is kept in build/bench as it comes: an interrupted run goes on where it
stopped, and a change of the code or of the deployment begins anew.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.common.environment import available_cores, describe_environment
from adalink.tools.common.report_file import write_json
from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cases import CASES, Case
from benchmarks.figures import check_fields, summary
from benchmarks.plots import draw
from benchmarks.prepare import copy_base, make_deployment, make_prompt
from benchmarks.process import REPOSITORY, MeasurementError, run, run_json
from benchmarks.readme import update
from benchmarks.scale import FULL, PROMPT_TOKENS, QUICK, RANK_TASKS, RATE_LENGTH, TASK_RANK, TASKS
from benchmarks.slopes import cost_model, fit
from benchmarks.store import Result, Store
from benchmarks.table import render
from examples.demo.run import find_model

_SOURCES = ("runtime", "export", "tools", "benchmarks")
_RECIPES = ("benchmarks/peers/make_models.py", "benchmarks/peers/requirements.txt", "constraints.txt")
_CASE_TIMEOUT_S, _BUILD_TIMEOUT_S = 300, 900


class Bench:
    """The steps of a whole run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._began = time.monotonic()
        self._scale = QUICK if arguments.quick else FULL
        self._source: Path = arguments.deployment
        self._model = find_model(arguments.model)
        self._work: Path = arguments.work
        self._pythons = {"kit": Path(sys.executable), "peers": arguments.peers_python}
        self._threads: int = arguments.threads
        self._logs = self._work / "logs"
        self._base, self._deployment = self._work / "base", self._work / "deployment"
        name = "quick" if arguments.quick else "full"
        self._key = self._digest()
        self._store = Store(self._work / name, self._key, self.progress)

    def progress(self, line: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)

    def report(self) -> Result:
        """Everything, as ``results/cpu.json`` holds it."""
        self.prepare()
        kit, peers = self.kit(), self.peers()
        speeds = [value for case in peers.values() for value in case.get("rounds", {}).get("memory_gb_s", [])]
        gb_s = statistics.median(speeds or [measure_bandwidth(self._threads)])
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": "make bench" + (" QUICK=1" if self._scale is QUICK else ""),
            "environment": describe_environment(),
            "settings": {
                "model": self._model.name,
                "threads": self._threads,
                "prompt_tokens": PROMPT_TOKENS,
                "new_tokens": self._scale.new_tokens,
                "rounds": self._scale.rounds,
                "task_rank": TASK_RANK,
            },
            "memory_gb_s": gb_s,
            "kit": kit,
            "peers": peers,
            "growth": self.growth(gb_s),
        }

    def prepare(self) -> None:
        """Make the deployment and the prompt that are measured, with a 4-bit variant beside the demo's base."""
        marker = self._work / "deployment.key"
        if marker.is_file() and marker.read_text(encoding="ascii") == self._key:
            return
        self.progress("a copy of the base, and the same in 4 bits")
        copy_base(self._source, self._base)
        command = [self._pythons["kit"], "-m", "adalink.tools", "export", "base", self._model, "--out", self._base]
        self._failure(partial(run, [*command, "--quantize", "int4"], _BUILD_TIMEOUT_S, self._logs / "int4.log"))
        self.progress(f"a deployment with {TASKS} seeded tasks")
        make_deployment(self._base, self._deployment, [TASK_RANK] * TASKS)
        with Deployment.open(self._deployment) as deployment:
            write_json(self._work / "prompt.json", make_prompt(deployment.tokenizer, PROMPT_TOKENS))
        marker.write_text(self._key, encoding="ascii")

    def kit(self) -> Result:
        """``adalink bench`` on the deployment that the demo made."""

        def make() -> Result:
            self.progress("adalink bench")
            report = self._work / "adalink-bench.json"
            command = [self._pythons["kit"], "-m", "adalink.tools", "bench", self._source, "--json-file", report]
            run([*command, "--threads", str(self._threads)], _BUILD_TIMEOUT_S, self._logs / "kit.log")
            return dict(json.loads(report.read_text(encoding="utf-8")))

        try:
            return self._store.get("kit", make)
        except MeasurementError as error:
            self.progress(f"FAILED, {error}")
            return {"error": str(error)}

    def peers(self) -> dict[str, Result]:
        """Every case, round by round; a case that fails is reported with the reason and measured no more."""
        missing = self._models()
        rounds: dict[str, list[Result]] = {case.name: [] for case in CASES}
        errors: dict[str, str] = {}
        for turn in range(self._scale.rounds):
            # The order alternates between rounds, so that a drift of the machine favours no case.
            for case in CASES if turn % 2 == 0 else CASES[::-1]:
                if case.is_slow and turn % 3:
                    continue
                if lacking := [name for name in case.needs if name in missing]:
                    errors[case.name] = f"{lacking[0]} could not be made: {missing[lacking[0]]}"
                if case.name in errors:
                    continue
                make = partial(self._measure, case, turn)
                try:
                    rounds[case.name].append(self._store.get(f"{case.name}.{turn}", make))
                except MeasurementError as error:
                    errors[case.name] = str(error)
                    self.progress(f"{case.label}: FAILED, {error}")
        summaries = {case.name: summary(case, rounds[case.name]) for case in CASES}
        for name, reason in errors.items():
            summaries[name]["error"] = reason
        return summaries

    def growth(self, gb_s: float) -> Result:
        """How cost grows: the points of each series up to the first that fails, and the slopes."""
        curves: Result = {}
        for series, xs in self._scale.growth.items():
            curves[series] = {"points": {}, "fits": {}}
            for x in xs:
                try:
                    point = self._store.get(f"growth.{series}.{x}", partial(self._point, series, x))
                except MeasurementError as error:
                    curves[series]["error"] = f"at {x}: {error}"
                    self.progress(f"growth with {series} {x}: FAILED, {error}")
                    break
                curves[series]["points"][x] = point
        rate_point = curves["sequence"]["points"].get(RATE_LENGTH)
        if rate_point is not None:
            model = cost_model(read_manifest(self._deployment), RATE_LENGTH, rate_point["prefill_ms"] / 1e3, gb_s)
            for series in curves:
                curves[series]["fits"] = fit(series, curves[series]["points"], model)
        return curves

    def _measure(self, case: Case, turn: int) -> Result:
        scale = self._scale
        command: list[str | Path] = [self._pythons[case.environment], "-m", f"benchmarks.peers.{case.module}"]
        command += ["--work", self._work, "--kind", case.kind, "--prompt", self._work / "prompt.json"]
        command += ["--new-tokens", str(scale.new_tokens), "--threads", str(self._threads)]
        command += ["--repeats", str(scale.repeats)]
        # The machine's limit moves within minutes, so it is measured around each case.
        before = measure_bandwidth(self._threads)
        result = run_json(command, _CASE_TIMEOUT_S, self._logs / f"{case.name}.{turn}.log")
        check_fields(result)
        result["memory_gb_s"] = (before + measure_bandwidth(self._threads)) / 2
        self.progress(f"round {turn + 1} of {scale.rounds}, {case.label}: {result['decode_tok_s']:.1f} tokens/s")
        return result

    def _point(self, series: str, x: int) -> Result:
        """One point, with tasks of its own where these are what grows."""
        path, folder = self._deployment, self._work / "growth"
        try:
            if series in ("tasks", "rank"):
                ranks = [TASK_RANK] * x if series == "tasks" else [x] * RANK_TASKS
                self.progress(f"growth: making {len(ranks)} tasks of rank {ranks[0]}")
                path = make_deployment(self._base, folder, ranks)
            command: list[str | Path] = [self._pythons["kit"], "-m", "benchmarks.growth", "--deployment", path]
            command += ["--series", series, "--x", str(x), "--threads", str(self._threads)]
            point = run_json(command, _CASE_TIMEOUT_S, self._logs / f"growth.{series}.{x}.log")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.progress(
            f"growth with {series} {x}: first token {point['prefill_ms']:.1f} ms, task switch {point['swap_us']:.1f} µs"
        )
        return point

    def _models(self) -> dict[str, str]:
        """Make what the peers need; reasons by the name of what could not be made."""
        missing: dict[str, str] = {}
        marker, key = self._work / "models.key", self._models_key()
        if not marker.is_file() or marker.read_text(encoding="ascii") != key:
            shutil.rmtree(self._work / "models", ignore_errors=True)
            marker.write_text(key, encoding="ascii")
        for name in dict.fromkeys(name for case in CASES for name in case.needs):
            folder = self._work / "models" / name
            if folder.is_dir():
                continue
            self.progress(f"making {name} for the peers")
            command = [self._pythons["peers"], "-m", "benchmarks.peers.make_models", "--model", self._model]
            command += ["--out", folder.parent, name]
            reason = self._failure(partial(run, command, _BUILD_TIMEOUT_S, self._logs / f"make-{name}.log"))
            if reason is not None:
                missing[name] = reason
        return missing

    def _models_key(self) -> str:
        """Digest of what the peers' models are made from: checkpoint, recipes, and the packages that make them."""
        digest = hashlib.sha256()
        checkpoint = sorted(self._model.rglob("*")) if self._model.is_dir() else [self._model]
        recipes = [REPOSITORY / name for name in _RECIPES]
        for path in [*checkpoint, *recipes]:
            if path.is_file():
                digest.update(f"{path.name} {digest_file(path)};".encode())
        return digest.hexdigest()

    def _failure(self, call: Callable[[], object]) -> str | None:
        """Why a call failed, said as well; ``None`` if it did not."""
        try:
            call()
        except MeasurementError as error:
            self.progress(f"FAILED, {error}")
            return str(error)
        return None

    def _digest(self) -> str:
        """Digest of the code, the deployment, the model and the settings: results of others are not reused."""
        digest = hashlib.sha256(repr((self._scale, self._threads, str(self._model))).encode())
        digest.update((self._source / "manifest.json").read_bytes())
        for folder in _SOURCES:
            for path in sorted((REPOSITORY / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        return digest.hexdigest()


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, default=Path("build/demo/deployment"))
    parser.add_argument("--model", help="model folder or GGUF file; SmolLM2 from its package without it")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--readme", type=Path, help="also write the measured section of this file")
    parser.add_argument("--peers-python", type=Path, default=Path("build/peers/bin/python"))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="one short round, for an impression")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    report = bench.report()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "cpu.json", report)
    (arguments.out / "cpu.md").write_text(render(report), encoding="utf-8")
    for path in draw(report, arguments.out):
        bench.progress(f"drew {path}")
    if arguments.readme is not None:
        update(arguments.readme, report)
    bench.progress(f"wrote {arguments.out / 'cpu.json'} and {arguments.out / 'cpu.md'}")


if __name__ == "__main__":
    main()
