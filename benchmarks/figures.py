"""Figures of the peers' scripts: checked, and summarised over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.cases import Case
from benchmarks.peers.common import FIELDS
from benchmarks.process import MeasurementError
from benchmarks.store import Result


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
        values = [figures[name] for figures in rounds]
        numbers = [value for value in values if isinstance(value, int | float)]
        result[name] = statistics.median(numbers) if numbers else values[0]
    result["rounds"] = {
        name: [figures[name] for figures in rounds]
        for name in ("prefill_ms", "first_token_ms", "decode_tok_s", "memory_gb_s")
    }
    return result
