"""A benchmark on a terminal: each figure with its name and unit, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adalink.tools.terminal.terminal_text import echo

# Metric without two sides -> its name for people, and what it is divided by to have the unit behind it.
_SINGLE = {
    "swap_hot_us_p50": ("switch of tasks, median", 1, "µs"),
    "swap_hot_us_p99": ("switch of tasks, 99 of 100 within", 1, "µs"),
    "task_load_ms": ("loading a task from the disk", 1, "ms"),
    "task_bytes": ("memory of one more task", 1e3, "kB"),
    "open_ratio": ("opening, of a bare ONNX Runtime session", 1, "x"),
    "import_ms": ("import, beyond numpy and onnxruntime", 1, "ms"),
}


def print_report(
    title: str, metrics: Sequence[Mapping[str, object]], medians: Mapping[str, float], tokens: int, rows: int
) -> None:
    """Print what ``Bench`` and ``measure_startup`` have measured on stdout.

    Args:
        title: base and task.
        metrics: entries with ``name``, ``value`` and ``unit``.
        medians: in milliseconds, by ``NAME_SIDE_ms``.
        tokens: tokens of the prompt.
        rows: rows of the mixed batch.
    """
    values = {str(metric["name"]): float(str(metric["value"])) for metric in metrics}
    step = 1 if "decode_ratio" in values else tokens
    echo(title)
    echo(f"{'':<26}{'base model':>22}{'with the task':>22}{'ratio':>9}")
    _print_sides(f"prompt of {tokens} tokens", "prefill", ("base", "task"), tokens, values, medians)
    _print_sides("decode step", "decode", ("base", "task"), 1, values, medians)
    echo(f"{'':<26}{'one task':>22}{f'{rows} tasks':>22}")
    _print_sides(f"step of {rows} rows", "mixed_batch", ("single", "mixed"), rows * step, values, medians)
    echo("A ratio is the median over the turns, not of the two times.")
    echo()
    for name, (label, divisor, unit) in _SINGLE.items():
        if name in values:
            echo(f"{label:<48}{values[name] / divisor:>10.4g} {unit}")


def _print_sides(
    label: str,
    name: str,
    sides: tuple[str, str],
    tokens: int,
    values: Mapping[str, float],
    medians: Mapping[str, float],
) -> None:
    if f"{name}_ratio" not in values:
        return
    times = [medians[f"{name}_{side}_ms"] for side in sides]
    echo(f"{label:<26}" + "".join(f"{f'{time:.4g} ms':>22}" for time in times) + f"{values[f'{name}_ratio']:>9.3f}")
    echo(f"{'':<26}" + "".join(f"{f'{1e3 * tokens / time:.4g} tokens/s':>22}" for time in times))
