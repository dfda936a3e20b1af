"""The report of `python -m benchmarks.serving`: ratios by hand, what was not measured, table and plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.report import BEGIN, END, HEAD, draw, ratios, rows, section


def figures(tok_s: float, **more: Any) -> dict[str, Any]:
    times = {"first_ms_p50": 40.0, "first_ms_p99": 400.0, "between_ms_p50": 4.0, "between_ms_p99": 44.0}
    users = {f"users-{users}": {"tok_s": tok_s * users, "errors": 0.0, **times} for users in (1, 4, 16)}
    return {**users, "memory_mb": 1234.0, **more}


def kit(tok_s: float) -> dict[str, Any]:
    long = {"during_ms_p50": 50.0, "during_ms_p99": 75.0, "before_ms_p50": 25.0}
    return figures(tok_s, burst=tok_s * 10, **{"sixteen-over-one": 0.98, "long-prompt": long})


@pytest.fixture
def measured() -> dict[str, Any]:
    """Three rounds, of which the third was slow for all: only ratios of one round agree."""
    speeds = (10.0, 12.0, 3.0)
    servers = {
        "kit-fp32": [kit(speed) for speed in speeds],
        "llama-f32-lora": [figures(speed / 5) for speed in speeds],
        "llama-f32": [figures(speed / 2) for speed in speeds],
        "kit-int4": [kit(speed) for speed in speeds],
    }
    closed = {"fp32": [speed * 12.5 for speed in speeds], "int4": [float("nan")] * 3}
    return {
        "servers": servers,
        "labels": {name: name.upper() for name in servers},
        "closed": closed,
        "ratios": ratios(servers, closed),
        "setting": {"tasks": 16, "rank": 16, "new_tokens": 48, "threads": 2, "rounds": 3},
        "environment": {"cpu": "a CPU"},
        "date": "2026-11-30",
    }


def test_ratios_are_medians_of_each_rounds_own(measured: dict[str, Any]) -> None:
    found = measured["ratios"]
    assert found["float32: 1 users over llama.cpp with LoRAs"] == pytest.approx(5)
    assert found["float32: 16 users over llama.cpp without"] == pytest.approx(2)
    assert found["float32: 16 tasks over one task"] == 0.98
    assert found["float32: server over closed batch"] == pytest.approx(0.8)
    assert found["float32: p99 between tokens while a long prompt joins over p50 during"] == 1.5
    assert found["float32: p99 between tokens while a long prompt joins over p50 before"] == 3


def test_what_was_not_measured_has_no_figure(measured: dict[str, Any]) -> None:
    assert math.isnan(measured["ratios"]["4 bit: 16 users over llama.cpp without"])
    assert math.isnan(measured["ratios"]["4 bit: server over closed batch"])
    assert [row[0] for row in rows(measured)] == ["KIT-FP32", "LLAMA-F32-LORA", "LLAMA-F32", "KIT-INT4"]


def test_the_part_of_the_readme(measured: dict[str, Any], tmp_path: Path) -> None:
    text = section(measured)
    assert "5.0 and 2.0 times in float32" in text
    assert "| KIT-FP32 | 10 | 40 | 160 | 40 ms | 400 ms | 4 ms | 44 ms | 1,234 MB |" in text
    assert all(len(row) == len(HEAD) for row in rows(measured))
    assert "nan" not in text
    assert BEGIN not in text
    assert END not in text
    draw(measured, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
