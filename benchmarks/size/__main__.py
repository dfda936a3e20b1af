"""Size beside peers: bytes shipped, memory, opening, first token, tokens/s, accuracy of the examples, exports.

python -m benchmarks.size --peers-python PYTHON [--models smollm2 0.5b 1b 3b] [--quick]

Each case is a process of its own. Cases take turns in rounds, whose order alternates. Every result is kept as it
comes, so that an interrupted run goes on where it stopped. A model's files are made, measured and removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from adalink.tools.common.environment import available_cores, describe_environment
from adalink.tools.common.report_file import write_json
from benchmarks.process import REPOSITORY, MeasurementError, run_json
from benchmarks.size.cases import GENAI, MODELS, QUICK_MODELS, QUICK_ROWS, Case, Model, quick
from benchmarks.size.files import Files
from benchmarks.size.report import STORED, write
from benchmarks.store import Result, Store

_TIMEOUT_S = 7200
# What a figure depends on; accuracy depends on the files of the model and on how they are scored.
_TIMED = ("src/adalink/runtime", "src/adalink/export", "benchmarks/size", "constraints.txt")
_SCORED = (
    *(f"benchmarks/size/engines/{name}.py" for name in ("kit", "llama_cpp", "genai")),
    *("benchmarks/size/accuracy.py", "src/adalink/runtime/llama_cpp"),
)


class Bench:
    """A measured run of one model.

    Args:
        model: the model.
        options: of the command line.
        known: cases of this model in the report that there is.
    """

    def __init__(self, model: Model, options: argparse.Namespace, known: Result) -> None:
        self._known = known
        self._model, self._options, self._began = model, options, time.monotonic()
        self._pythons = {"kit": Path(sys.executable), "peers": options.peers_python}
        self._files = Files(options.work, model, self._pythons, self.progress)
        settings = f"{model} {options.threads}"
        folder = options.work / "results" / model.name
        self._timed = Store(folder / "timed", digest_code(_TIMED, settings), self.progress)
        self._scored = Store(folder / "accuracy", digest_code(_SCORED, ""), self.progress)

    def progress(self, line: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)

    def report(self) -> Result:
        """Everything about the model, as ``results/size.json`` holds it under its name."""
        errors = self._files.make()
        prompts, rows, adapters = self._files.write_inputs()
        cases = [case for case in self._model.cases if case.name not in errors]
        scores = {}
        if self._model.is_real:
            for case in cases:
                try:
                    scores[case.name] = self._accuracy(case, rows, adapters)
                except MeasurementError as error:
                    self.progress(f"{case.label}: no accuracy, {error}")
        self._files.remove_checkpoint()
        rounds = self._rounds(cases, prompts, errors)
        measured = {case.name: self._case(case, rounds, scores, errors) for case in self._model.cases}
        if not self._options.keep:
            self._files.remove()
        return {
            "label": self._model.label,
            "date": date.today().isoformat(),
            "command": self._options.command,
            "load": self._options.note,
            "environment": describe_environment(),
            "settings": {
                "threads": self._options.threads,
                "new_tokens": self._model.new_tokens,
                "rounds": self._model.rounds,
            },
            "cases": measured,
        }

    def _case(self, case: Case, rounds: dict[str, list[Result]], scores: Result, errors: dict[str, str]) -> Result:
        error = {"error": errors[case.name]} if case.name in errors else {}
        if case.name not in rounds:
            return {"label": case.label, **error}
        measured = {"rounds": rounds[case.name], "accuracy": scores.get(case.name)}
        return {"label": case.label, **self._files.made(case), **measured, **error}

    def _rounds(self, cases: list[Case], prompts: Path, errors: dict[str, str]) -> dict[str, list[Result]]:
        """Times and memory, round by round; a case that fails is measured no more."""
        rounds: dict[str, list[Result]] = {case.name: [] for case in cases}
        for turn in range(self._model.rounds):
            # The order alternates, so that a drift of the machine favours no case.
            for case in cases if turn % 2 == 0 else cases[::-1]:
                if case.name in errors:
                    continue
                self.progress(f"{self._model.label}, round {turn + 1} of {self._model.rounds}: {case.label}")
                try:
                    make = partial(self._measure, case, prompts, turn)
                    rounds[case.name].append(self._timed.get(f"{case.name}.{turn}", make))
                except MeasurementError as error:
                    errors[case.name] = str(error)
                    self.progress(f"{case.label}: FAILED, {error}")
        return rounds

    def _measure(self, case: Case, prompts: Path, turn: int) -> Result:
        command = [*self._engine(case, "measure"), "--model", self._files.path(case).resolve(), "--prompts"]
        command += [prompts.resolve(), "--new-tokens", str(self._model.new_tokens)]
        command += ["--repeats", str(self._model.repeats)]
        return self._run(command, f"{case.name}.{turn}")

    def _accuracy(self, case: Case, rows: Path, adapters: Path) -> Result:
        """Accuracy of both tasks; the report's own, if it is of the same files, scored in the same way."""
        command = [*self._engine(case, "accuracy"), "--rows", rows.resolve(), "--adapters", adapters.resolve()]
        path = self._files.path(case)
        if case == GENAI:
            self._files.make_embedded_graph()
            path = self._files.graph_without_table
            command += ["--table", self._files.table.resolve()]
        if self._options.rows:
            command += ["--limit", str(self._options.rows)]
        depends_on = {
            "files": self._files.digest(path)[:16],
            "scoring": digest_code(_SCORED, "")[:16],
            "limit": self._options.rows,
        }
        known = self._known.get(case.name, {}).get("accuracy") or {}
        if all(known.get(name) == value for name, value in depends_on.items()):
            return dict(known)
        make = partial(self._score, [*command, "--model", path.resolve()], case)
        name = f"{case.name}.{depends_on['files']}.{self._options.rows or 'all'}"
        return {**self._scored.get(name, make), **depends_on}

    def _score(self, command: list[str | Path], case: Case) -> Result:
        if self._options.no_accuracy:
            raise MeasurementError("left out")
        self.progress(f"{self._model.label}: accuracy of {case.label}")
        return self._run(command, f"{case.name}.accuracy")

    def _engine(self, case: Case, command: str) -> list[str | Path]:
        python: list[str | Path] = [self._pythons[case.environment], "-m", f"benchmarks.size.engines.{case.engine}"]
        return [*python, command, "--threads", str(self._options.threads)]

    def _run(self, command: list[str | Path], name: str) -> Result:
        return run_json(command, _TIMEOUT_S, self._options.work / "logs" / f"{self._model.name}.{name}.log")


def digest_code(names: tuple[str, ...], settings: str) -> str:
    """Digest of the code and of the settings that results depend on."""
    digest = hashlib.sha256(settings.encode())
    for name in names:
        path = REPOSITORY / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Measure the models, one after another, and write their part of the report as each is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="these alone")
    parser.add_argument("--peers-python", type=Path, default=Path("build/peers/bin/python"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/size"))
    parser.add_argument("--out", type=Path, help=f"JSON file; models that it has keep their part; {STORED} without it")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--keep", action="store_true", help="do not remove a model's files")
    parser.add_argument("--no-accuracy", action="store_true", help="keep what accuracy there is, and measure no more")
    parser.add_argument("--rounds", type=int, help="as many rounds; by default as many as the model has")
    parser.add_argument("--rows", type=int, help="accuracy on the first rows of each task alone")
    parser.add_argument("--note", default="", help="of the machine, such as its load, for the report")
    parser.add_argument("--quick", action="store_true", help="one short round of two models, for an impression")
    options = parser.parse_args()
    if options.quick:
        options.rows = options.rows or QUICK_ROWS
    out: Path = options.out or (options.work / "quick.json" if options.quick else STORED)
    names = options.models or (QUICK_MODELS if options.quick else list(MODELS))
    options.command = " ".join(
        ["python -m benchmarks.size", *(["--quick"] if options.quick else []), "--models", *names]
    )
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for name in names:
        model = quick(MODELS[name]) if options.quick else MODELS[name]
        if options.rounds is not None:
            model = dataclasses.replace(model, rounds=options.rounds)
        bench = Bench(model, options, report.get(name, {}).get("cases", {}))
        try:
            report[name] = bench.report()
        except MeasurementError as error:
            bench.progress(f"{name}: FAILED, {error}")
            continue
        write_json(out, report)
        bench.progress(f"wrote {out}")
    if out == STORED:
        write(report)


if __name__ == "__main__":
    main()
