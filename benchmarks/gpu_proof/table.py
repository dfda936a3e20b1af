"""The short table at the end of a run: failures first, each with the last line of its traceback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_proof.record import STATUSES

_REASON_CHARACTERS = 220


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The table's lines."""
    steps = report["steps"]
    order = {status: number for number, status in enumerate(STATUSES)}
    names = sorted(steps, key=lambda name: order.get(steps[name]["status"], 0))
    width = max(map(len, names), default=0)
    lines = [f"{'step':{width}}  {'status':9}  seconds  why"]
    for name in names:
        step = steps[name]
        seconds, reason = step.get("seconds", 0.0), step["reason"][:_REASON_CHARACTERS]
        lines.append(f"{name:{width}}  {step['status']:9}  {seconds:7.1f}  {reason}")
    targets = [(name, target) for name in names for target in steps[name].get("targets", [])]
    for name, target in sorted(targets, key=lambda pair: bool(pair[1]["met"])):
        said = "met" if target["met"] else "NOT MET"
        lines.append(
            f"target {said}: {name}, {target['name']}: {_figure(target['measured'])} (at most {target['limit']})"
        )
    return lines


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"
