"""The tables of the checklist: wheels, digests and pieces, and how long each step took in a rehearsal.

``python -m benchmarks.gpu_proof.checklist`` writes them into ``docs/project/gpu-proof.md``. With ``--rehearsal FILE``,
a ``gpu-proof.json``, it keeps that run's times in ``rehearsal.json`` first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.page import replaced
from benchmarks.gpu_proof.record import read_json, write_json
from benchmarks.gpu_proof.schedule import STEPS
from benchmarks.gpu_proof.wheels import Wheel, read_list
from benchmarks.table import table

PAGE = Path(__file__).parents[2] / "docs" / "project" / "gpu-proof.md"
REHEARSAL = Path(__file__).with_name("rehearsal.json")
_SHOWN_DIGITS = 16


def section(wheels: list[Wheel], rehearsal: Mapping[str, Any]) -> str:
    """The tables."""
    pieces = [part for wheel in wheels for part in wheel.parts]
    total, loads = sum(part.size for part in pieces) / 1e6, max(part.load for part in pieces)
    lines = [f"{len(wheels)} wheels, {total:.0f} MB, {len(pieces)} pieces in {loads} loads.", ""]
    columns = ["package", "version", "for", "unless the machine has", "MB", "loads"]
    lines += [*table(columns, _wheel_rows(wheels)), ""]
    lines += ["Digests, the first 16 digits of SHA-256; `wheels.json` has them whole:", ""]
    lines += table(["load", "file", "bytes", "SHA-256"], sorted(_piece(part) for part in pieces))
    lines += ["", f"The steps, and their seconds in the rehearsal of {rehearsal['date']} ({rehearsal['cpu']}):", ""]
    lines += table(["step", "what it tries", "limit, s", "rehearsal, s"], [_step(step, rehearsal) for step in STEPS])
    return "\n".join(lines)


def _wheel_rows(wheels: list[Wheel]) -> list[list[str]]:
    rows = []
    for wheel in wheels:
        loads = sorted({part.load for part in wheel.parts})
        span = str(loads[0]) if len(loads) == 1 else ", ".join(map(str, loads))
        unless = f"`{wheel.unless}`" if wheel.unless else ""
        rows.append([f"`{wheel.name}`", wheel.version, wheel.use, unless, f"{wheel.size / 1e6:.1f}", span])
    return rows


def _piece(part: Any) -> list[str]:
    return [f"{part.load:02}", f"`{part.file}`", f"{part.size:,}", f"`{part.sha256[:_SHOWN_DIGITS]}`"]


def _step(step: Any, rehearsal: Mapping[str, Any]) -> list[str]:
    seconds = rehearsal["seconds"].get(step.name)
    return [f"`{step.name}`", step.what, f"{step.limit_s:.0f}", "" if seconds is None else f"{seconds:.1f}"]


def keep(report: Mapping[str, Any], path: Path = REHEARSAL) -> None:
    """Keep a rehearsal's times."""
    machine = report["steps"].get("machine", {}).get("figures", {}).get("environment", {})
    seconds = {name: step["seconds"] for name, step in report["steps"].items() if name != "wheels"}
    cpu = f"{machine.get('cpu', 'a CPU')}, {machine.get('cores', '?')} cores"
    write_json(path, {"date": report["date"], "cpu": cpu, "seconds": seconds})


def current() -> str:
    """The tables as they should be in the page."""
    return section(read_list(), json.loads(REHEARSAL.read_text(encoding="utf-8")))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearsal", type=Path, help="a rehearsal's gpu-proof.json")
    options = parser.parse_args()
    if options.rehearsal is not None:
        report = read_json(options.rehearsal)
        assert report is not None, f"{options.rehearsal} is no report"
        keep(report)
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), current()), encoding="utf-8")


if __name__ == "__main__":
    main()
