"""``make bench``: measure the kit, its peers and how cost grows; write results, a table and plots.

python -m benchmarks.run [--quick]. Every result is kept in build/bench as it comes: an interrupted run goes on where it
stopped, and a change of the code or of the deployment begins anew.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adalink.runtime.deployment import Deployment
from adalink.tools.demo import find_model
from adalink.tools.environment import available_cores, describe_environment
from adalink.tools.report_file import write_json
from benchmarks.bandwidth import measure_bandwidth
from benchmarks.cases import CASES, Case
from benchmarks.peers.common import FIELDS
from benchmarks.prepare import make_deployment, make_prompt
from benchmarks.process import REPOSITORY, MeasurementError, run, run_json

PROMPT_TOKENS = 128
TASK_RANK = 16
TASKS = 18
_SOURCES = ("runtime", "export", "tools", "benchmarks")
_CASE_TIMEOUT_S, _BUILD_TIMEOUT_S, _KIT_TIMEOUT_S = 300, 600, 900

Result = dict[str, object]


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: processes of each case, the cases taking turns.
        new_tokens: tokens that each generates.
        repeats: short measurements in each process.
    """

    rounds: int
    new_tokens: int
    repeats: int


FULL = Scale(rounds=5, new_tokens=256, repeats=5)
QUICK = Scale(rounds=1, new_tokens=64, repeats=3)


class Store:
    """Results on the disk, each under a name, good for as long as ``key`` is the same."""

    def __init__(self, folder: Path, key: str, progress: Callable[[str], None]) -> None:
        self._folder = folder
        self._key = key
        self._progress = progress
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Result]) -> Result:
        """The stored result, or else a new one, stored; what ``make`` raises is not stored."""
        path = self._folder / f"{name}.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == self._key:
                self._progress(f"{name}: measured before, kept")
                return dict(stored["result"])
        result = make()
        write_json(path, {"key": self._key, "result": result})
        return result


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
        self._deployment = self._work / "deployment"
        name = "quick" if arguments.quick else "full"
        self._store = Store(self._work / name, self._key(), self.say)

    def say(self, line: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)

    def prepare(self) -> None:
        """Make the deployment and the prompt that are measured."""
        marker = self._work / "deployment.key"
        if marker.is_file() and marker.read_text(encoding="ascii") == self._key():
            return
        self.say(f"a deployment with {TASKS} seeded tasks")
        make_deployment(self._source, self._deployment, [TASK_RANK] * TASKS)
        with Deployment.open(self._deployment) as deployment:
            write_json(self._work / "prompt.json", make_prompt(deployment.tokenizer, PROMPT_TOKENS))
        marker.write_text(self._key(), encoding="ascii")

    def kit(self) -> Result:
        """``adalink bench`` on the deployment that the demo made."""

        def make() -> Result:
            self.say("adalink bench")
            report = self._work / "adalink-bench.json"
            command = [self._pythons["kit"], "-m", "adalink.tools", "bench", self._source, "--json", report]
            run([*command, "--threads", str(self._threads)], _KIT_TIMEOUT_S, self._logs / "kit.log")
            return dict(json.loads(report.read_text(encoding="utf-8")))

        return self._attempt(lambda: self._store.get("kit", make))

    def peers(self) -> dict[str, Result]:
        """Every case, round by round; a case that fails is reported with the reason and measured no more."""
        missing = self._models()
        rounds: dict[str, list[Result]] = {case.name: [] for case in CASES}
        errors: dict[str, str] = {}
        for turn in range(self._scale.rounds):
            # Who goes first changes with every round, so that a drift of the machine favours nobody.
            for case in CASES if turn % 2 == 0 else CASES[::-1]:
                if lacking := [name for name in case.needs if name in missing]:
                    errors[case.name] = f"{lacking[0]} could not be made: {missing[lacking[0]]}"
                if case.name in errors:
                    continue
                try:
                    rounds[case.name].append(self._store.get(f"{case.name}.{turn}", partial(self._measure, case, turn)))
                except MeasurementError as error:
                    errors[case.name] = str(error)
                    self.say(f"{case.label}: FAILED, {error}")
        return {case.name: {**summary(case, rounds[case.name]), **_error(errors.get(case.name))} for case in CASES}

    def bandwidth(self) -> Result:
        """The machine's own limit."""

        def make() -> Result:
            self.say("memory bandwidth")
            return measure_bandwidth(self._threads)

        return self._store.get("bandwidth", make)

    def report(self) -> Result:
        """Everything, as ``results/cpu.json`` holds it."""
        self.prepare()
        bandwidth, kit, peers = self.bandwidth(), self.kit(), self.peers()
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
            "bandwidth": bandwidth,
            "kit": kit,
            "peers": peers,
        }

    def _measure(self, case: Case, turn: int) -> Result:
        scale = self._scale
        command: list[str | Path] = [self._pythons[case.environment], "-m", f"benchmarks.peers.{case.module}"]
        command += ["--work", self._work, "--kind", case.kind, "--prompt", self._work / "prompt.json"]
        command += ["--new-tokens", str(scale.new_tokens), "--threads", str(self._threads)]
        command += ["--repeats", str(scale.repeats)]
        result = run_json(command, _CASE_TIMEOUT_S, self._logs / f"{case.name}.{turn}.log")
        check_fields(result)
        self.say(f"round {turn + 1} of {scale.rounds}, {case.label}: {result['decode_tok_s']:.1f} tokens/s")
        return result

    def _models(self) -> dict[str, str]:
        """Make what the peers need; reasons by the name of what could not be made."""
        missing: dict[str, str] = {}
        for name in dict.fromkeys(name for case in CASES for name in case.needs):
            folder = self._work / "models" / name
            if folder.is_dir():
                continue
            self.say(f"making {name} for the peers")
            command = [self._pythons["peers"], "-m", "benchmarks.peers.make_models", "--model", self._model]
            try:
                command += ["--out", folder.parent, name]
                run(command, _BUILD_TIMEOUT_S, self._logs / f"make-{name}.log")
            except MeasurementError as error:
                missing[name] = str(error)
                self.say(f"{name}: FAILED, {error}")
        return missing

    def _attempt(self, make: Callable[[], Result]) -> Result:
        try:
            return make()
        except MeasurementError as error:
            self.say(f"FAILED, {error}")
            return _error(str(error))

    def _key(self) -> str:
        """Digest of the code, the deployment, the model and the settings: results of others are not reused."""
        digest = hashlib.sha256(repr((self._scale, self._threads, str(self._model))).encode())
        digest.update((self._source / "manifest.json").read_bytes())
        for folder in _SOURCES:
            for path in sorted((REPOSITORY / folder).rglob("*.py")):
                digest.update(path.read_bytes())
        return digest.hexdigest()


def check_fields(result: Mapping[str, object]) -> None:
    """Raise ``MeasurementError`` unless a script printed exactly the common fields, with numbers where they must be."""
    if wrong := sorted(result.keys() ^ set(FIELDS)):
        raise MeasurementError(f"field {wrong[0]!r} is missing or unknown")
    for name in ("prefill_ms", "first_token_ms", "decode_tok_s", "engine_load_s", "resident_mb"):
        value = result[name]
        if not isinstance(value, float) or not value > 0:
            raise MeasurementError(f"field {name!r} is {value!r}, expected a positive number")


def summary(case: Case, rounds: list[Result]) -> Result:
    """Medians over the rounds, and every round's figures beside them."""
    result: Result = {"label": case.label, "precision": case.precision, "without": case.without}
    if not rounds:
        return result
    for name in FIELDS:
        values = [found[name] for found in rounds]
        numbers = [value for value in values if isinstance(value, int | float)]
        result[name] = statistics.median(numbers) if numbers else values[0]
    result["rounds"] = {
        name: [found[name] for found in rounds] for name in ("prefill_ms", "first_token_ms", "decode_tok_s")
    }
    return result


def _error(reason: str | None) -> Result:
    return {} if reason is None else {"error": reason}


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", type=Path, default=Path("build/demo/deployment"))
    parser.add_argument("--model", help="model folder or GGUF file; SmolLM2 from its package without it")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--peers-python", type=Path, default=Path("build/peers/bin/python"))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="one short round, for an impression")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    report = bench.report()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "cpu.json", report)
    bench.say(f"wrote {arguments.out / 'cpu.json'}")


if __name__ == "__main__":
    main()
