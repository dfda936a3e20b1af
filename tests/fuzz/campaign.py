"""A run of many inputs in worker processes: a worker that crashes or hangs is counted, ended and replaced."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.kind import write_files
from fuzz.kinds import KINDS, generator_of
from fuzz.outcomes import BAD, GOOD, Outcome
from helpers.paths import REPOSITORY

# Of processor time, so that a busy machine makes no hangs; and of waiting, for what would wait for ever.
CPU_LIMIT_SECONDS = 30.0
IDLE_LIMIT_SECONDS = 120.0
_POLL_SECONDS = 0.25
CLASSES = (*GOOD, *BAD, "harness")


@dataclass
class Totals:
    """What a run counted.

    Attributes:
        seed: of the first input.
        counts: by kind and class.
        failures: the inputs whose class is not a good one, each with how to repeat it.
        seconds: time on the clock.
        slowest: seconds of the slowest answer by kind.
    """

    seed: int
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    slowest: dict[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return sum(sum(counter.values()) for counter in self.counts.values())

    def of(self, outcome: str) -> int:
        return sum(counter[outcome] for counter in self.counts.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "inputs": self.inputs,
            "seconds": round(self.seconds, 1),
            "classes": {name: self.of(name) for name in CLASSES},
            "kinds": {
                name: {
                    "inputs": sum(counter.values()),
                    "slowest_ms": round(1000 * self.slowest.get(name, 0)),
                    **counter,
                }
                for name, counter in sorted(self.counts.items())
            },
            "failures": self.failures,
        }


class Worker:
    """A worker process, started when it is first needed and again after it ended."""

    def __init__(self, corpus: Path, work: Path) -> None:
        self._corpus, self._work = corpus, work
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = work / "stderr.txt"
        work.mkdir(parents=True, exist_ok=True)

    def answer(self, kind: str, seed: int) -> tuple[Outcome, float]:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        begun, (cpu, _), idle = time.monotonic(), activity(process.pid), 0.0
        try:
            process.stdin.write(f"{kind} {seed}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            return self._crashed(process), 0.0
        while not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
            now, is_running = activity(process.pid)
            idle = 0.0 if is_running else idle + _POLL_SECONDS
            if now - cpu > CPU_LIMIT_SECONDS or idle > IDLE_LIMIT_SECONDS:
                self.close()
                return Outcome("hang", f"no answer after {now - cpu:.0f} s of processor time"), now - cpu
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            return self._crashed(process), time.monotonic() - begun
        name, detail, seconds = json.loads(line)
        return Outcome(name, detail), seconds

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            paths = os.pathsep.join(map(str, (REPOSITORY / "tests", REPOSITORY / "src", REPOSITORY)))
            environment = os.environ | {
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "XDG_CACHE_HOME": str(self._work / "cache"),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker", str(self._corpus), str(self._work)],
                cwd=self._work,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors.open("wb"),
            )
        return self._process

    def _crashed(self, process: subprocess.Popen[bytes]) -> Outcome:
        code = process.wait()
        self._process = None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = self._errors.read_bytes().decode("utf-8", "replace").strip().splitlines()
        return Outcome("crash", f"{name}: {' | '.join(said[-3:])[:400]}")


def activity(process: int) -> tuple[float, bool]:
    """Processor time of a process, and whether it computes or waits for a processor: not for anything else.

    Where the system does not tell, every process counts as waiting, and the clock alone decides.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, False
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] in "RD"


def schedule(seed: int, names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Kinds by their weights, each input with a seed of its own."""
    round_of = [name for name in names for _ in range(KINDS[name].weight)]
    order = np.random.default_rng(0).permutation(len(round_of))
    for index in itertools.count():
        yield round_of[order[index % len(order)]], seed + index


def run(
    corpus: Path,
    work: Path,
    *,
    seed: int = 0,
    seconds: float | None = None,
    inputs: int | None = None,
    jobs: int = 1,
    names: Sequence[str] = (),
    keep: Path | None = None,
    progress: Callable[[Totals], None] = lambda totals: None,
) -> Totals:
    """Feed the kit mutated inputs until the time or their number is over.

    Args:
        corpus: the whole inputs (``fuzz.corpus``).
        work: an empty folder to work in.
        seed: of the first input; the next has the next one.
        seconds: stop after this time.
        inputs: stop after so many.
        jobs: worker processes.
        names: kinds; all by default.
        keep: folder for the inputs that failed.
        progress: called after every input.
    """
    totals, lock, begun = Totals(seed), threading.Lock(), time.monotonic()
    order = schedule(seed, list(names) or list(KINDS))
    left = iter(range(inputs)) if inputs is not None else iter(int, 1)

    def serve(number: int) -> None:
        worker = Worker(corpus, work / str(number))
        try:
            while True:
                with lock:
                    if next(left, None) is None or (seconds is not None and time.monotonic() - begun > seconds):
                        return
                    kind, own = next(order)
                outcome, spent = worker.answer(kind, own)
                with lock:
                    totals.counts.setdefault(kind, Counter())[outcome.kind] += 1
                    totals.slowest[kind] = max(spent, totals.slowest.get(kind, 0.0))
                    if outcome.kind not in GOOD:
                        totals.failures.append(_failure(corpus, work, kind, own, outcome, keep))
                    totals.seconds = time.monotonic() - begun
                    progress(totals)
        finally:
            worker.close()

    threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals.seconds = time.monotonic() - begun
    return totals


def _failure(corpus: Path, work: Path, kind: str, seed: int, outcome: Outcome, keep: Path | None) -> dict[str, Any]:
    """What is reported of an input that failed; its files are saved, made again from the seed."""
    repeat = f"python -m fuzz repeat {kind} {seed}"
    if keep is not None:
        folder = keep / f"{outcome.kind}-{kind}-{seed}"
        write_files(folder, KINDS[kind](corpus, work / "again").make(generator_of(kind, seed)))
        (folder / "WHY.txt").write_text(
            f"{outcome.kind}: {outcome.detail}\n{repeat}\n", encoding="utf-8", errors="replace"
        )
    return {"class": outcome.kind, "kind": kind, "seed": seed, "detail": outcome.detail, "repeat": repeat}
