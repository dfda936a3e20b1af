"""Prove the kit on an NVIDIA GPU: one command, no network, no questions.

python -m benchmarks.gpu_proof --wheels DIR --out DIR --minutes 12

Writes ``gpu-proof.json`` and ``gpu-proof.txt`` into OUT: two files, whole at any moment. Steps that no longer fit into
the minutes are left out and named; with ``--go-on`` a further call runs them. It ends with code 0 whatever they did.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.record import FAILED, PASSED, SKIPPED, read_json
from benchmarks.gpu_proof.schedule import STEPS, Driver, Step, step_environment
from benchmarks.gpu_proof.table import lines_of
from benchmarks.gpu_proof.wheels import install, name_the_kit, read_list

SCHEMA = 1
_WHEEL_SECONDS = 90.0
_WORK = Path(__file__).parents[2] / "build" / "gpu-proof"


def main() -> None:
    """Run what fits into the minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels or pieces; without it nothing is installed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--work", type=Path, default=_WORK, help="folder of all else; build/gpu-proof by default")
    parser.add_argument("--minutes", type=float, default=12.0, help="time for everything")
    parser.add_argument("--steps", nargs="+", metavar="NAME", choices=[step.name for step in STEPS], help="only these")
    parser.add_argument("--go-on", action="store_true", help="run what the last call in this work folder left out")
    parser.add_argument("--tiny", action="store_true", help="tiny bases, to see that the script works")
    parser.add_argument("--rehearse", action="store_true", help="run steps on stand-ins where there is no GPU")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is ended too
    chosen = [step for step in STEPS if options.steps is None or step.name in options.steps]
    report = prove(options, chosen, time.monotonic() + 60 * options.minutes)
    lines = lines_of(report)
    (options.out / "gpu-proof.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]), flush=True)


def prove(options: argparse.Namespace, steps: list[Step], deadline: float) -> dict[str, Any]:
    """Install and run the steps; returns the report."""
    begun, work = time.monotonic(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    site = work / "site"
    last = read_json(work / "gpu-proof.json") if options.go_on else None
    driver = Driver(
        (options.out / "gpu-proof.json", work / "gpu-proof.json"),
        work,
        deadline,
        step_environment(site, work),
        is_full=not options.tiny,
        rehearses=options.rehearse,
    )
    driver.describe(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        command="python -m benchmarks.gpu_proof " + " ".join(sys.argv[1:]),
        commit=_commit(),
        python=platform.python_version(),
        minutes=options.minutes,
        is_full=not options.tiny,
    )
    driver.go_on(last or {})
    name_the_kit(site)
    if not driver.has("wheels"):
        driver.note("wheels", install_wheels(options.wheels, work, driver))
    driver.run(steps)
    driver.describe(seconds=round(time.monotonic() - begun, 1))
    return driver.content


def install_wheels(folder: Path | None, work: Path, driver: Driver) -> dict[str, Any]:
    """The step before all others; a wheel that is missing or damaged costs what needs it."""
    begun = time.monotonic()
    if folder is None:
        return {
            "what": "wheels",
            "status": SKIPPED,
            "reason": "no --wheels: the packages that are here",
            "seconds": 0.0,
        }
    try:
        went = install(read_list(), folder, work, dict(os.environ), min(_WHEEL_SECONDS, max(driver.seconds_left, 1)))
        bad = [f"{name}: {how}" for name, how in went.items() if how.startswith("failed")]
        status, reason = (FAILED, "; ".join(bad)) if bad else (PASSED, "")
    except Exception as error:  # the steps may run all the same
        went, status, reason = {}, FAILED, f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - begun, 2)
    return {"what": "wheels", "status": status, "reason": reason, "seconds": seconds, "figures": went}


def _commit() -> str | None:
    """The checkout's commit; ``None`` where git does not say."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    main()
