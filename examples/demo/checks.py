"""Parity and speed of the demo's deployment, each in a short table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adalink.tools.terminal.console import print_table
from examples.demo import Progress

if TYPE_CHECKING:
    from adalink.tools.parity.report import Check
    from examples.demo.state import DemoState

# What the groups of checks compare: the first word of a check's name.
_GROUPS = {
    "adapter": "the exported adapters with the trained ones",
    "base": "the base model's outputs with PyTorch's",
    "task": "each task's outputs with PyTorch's",
    "control": "a task changes the outputs (negative control)",
    "mixed": "a batch of mixed tasks with single rows",
    "swap": "outputs after switching tasks with fresh processes",
    "receipt": "nothing was rebuilt, the base's files are unchanged",
}
_RECEIPT = ("engine_builds_during_swaps", "builder_calls_during_swaps", "base_unchanged")
# Unit and meaning of the benchmark's metrics.
_METRICS = {
    "prefill_ratio": ("x", "time of a prompt, a task active / base model"),
    "decode_ratio": ("x", "time of a token, a task active / base model"),
    "swap_hot_us_p50": ("µs", "switching between loaded tasks, median"),
    "swap_hot_us_p99": ("µs", "switching between loaded tasks, 99th percentile"),
    "task_load_ms": ("ms", "loading a task from the disk"),
    "mixed_batch_ratio": ("x", "time of a token, 32 rows of 32 tasks / of one task"),
}


def show_parity(path: Path, source: Path, state: DemoState, progress: Progress) -> bool:
    """Verify, or show the stored report of the very same files; returns whether all checks passed."""
    from adalink.tools.common.environment import describe_environment
    from adalink.tools.parity.report import Check, Report
    from adalink.tools.parity.suite import VerifyOptions, verify

    stored = state.verification()
    if stored is not None:
        progress("parity: verified before; model, deployment files and kit version have the same digests, reused")
        report = Report([Check(**check) for check in stored["checks"]], stored["receipt"], stored["skipped"])
    else:
        report = verify(
            path, str(source), {}, VerifyOptions(quick=True), progress=lambda line: progress(f"parity: {line}")
        )
        if report.passed:
            state.set_verification(json.loads(json.dumps(report.as_json(describe_environment()))))
    print_parity(report.checks)
    for line in report.skipped:
        click.echo(f"Not checked: {line}")
    for name in _RECEIPT:
        if name in report.receipt:
            click.echo(f"Receipt: {name} {json.dumps(report.receipt[name])}")
    return report.passed


def print_parity(checks: Sequence[Check]) -> None:
    """Print a line a group of checks, and every check that failed in full."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.name.partition("/")[0], []).append(check)
    rows = [
        ("pass" if all(check.passed for check in group) else "FAIL", name, len(group), _GROUPS.get(name, ""))
        for name, group in groups.items()
    ]
    print_table("Parity with PyTorch", ("", "group", "checks", "compared"), rows)
    failed = [check for check in checks if not check.passed]
    for check in failed:
        click.echo(f"FAIL {check.name}: measured {check.measured:.3g}, limit {check.limit:.3g}: {check.detail}")
    if failed:
        click.echo(f"{len(failed)} of {len(checks)} checks failed.")
    else:
        click.echo(f"All {len(checks)} checks passed.")


def show_bench(path: Path, progress: Progress) -> None:
    """Print a short benchmark."""
    from adalink.tools.bench.measure import Bench

    bench = Bench(path, None, "onnxruntime-cpu", None)
    try:
        metrics, _ = bench.measure(lambda line: progress(f"bench: {line}"), quick=True)
    finally:
        bench.close()
    rows = []
    for metric in metrics:
        name = str(metric["name"])
        unit, meaning = _METRICS.get(name, (str(metric["unit"]), ""))
        rows.append((name, f"{metric['value']:.3g} {unit}", meaning))
    print_table("Short benchmark", ("metric", "value", "meaning"), rows)
