"""The guide's account of GPUs follows from the committed runs, and a run's faults cannot be left out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof import checklist
from benchmarks.gpu_proof.page import BEGIN, END, latest, section, update, written
from benchmarks.gpu_proof.record import STATUSES
from benchmarks.gpu_proof.schedule import STEPS
from benchmarks.gpu_proof.wheels import read_list


def make_report(**steps: Any) -> dict[str, Any]:
    gpu = {"name": "Planted GPU", "capability": "sm99", "memory_bytes": 10**10}
    figures = {"gpus": {"devices": [gpu], "driver": "13.0"}, "environment": {"packages": {"torch": "2.99"}}}
    machine = {"status": "passed", "reason": "", "figures": figures, "targets": []}
    return {"date": "2026-12-01", "steps": {"machine": machine, **steps}}


def test_the_page_is_current() -> None:
    """After a change: python -m benchmarks.gpu_proof.page."""
    assert written() == section(latest())


def test_the_checklist_is_current() -> None:
    """After a change: python -m benchmarks.gpu_proof.checklist."""
    assert written(checklist.PAGE) == checklist.current()


def test_the_checklist_has_every_piece_and_every_step() -> None:
    text = checklist.current()
    for wheel in read_list():
        assert all(f"`{part.file}` | {part.size:,} | `{part.sha256[:16]}`" in text for part in wheel.parts)
    assert all(f"| `{step.name}` |" in text for step in STEPS)


def test_a_rehearsals_times_are_kept(tmp_path: Path) -> None:
    step = {"status": "no device", "reason": "", "figures": {}, "seconds": 3.25}
    checklist.keep(
        make_report(cells=step, wheels=step) | {"steps": {"cells": step, "wheels": step}}, tmp_path / "r.json"
    )
    kept = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert kept["seconds"] == {"cells": 3.25}
    assert "| `cells` | many configurations in one batch | 75 | 3.2 |" in checklist.section(read_list(), kept)


def test_without_a_run_nothing_is_claimed() -> None:
    text = section(None)
    assert "Nothing has run on a GPU yet" in text
    assert all(f"`{step.name}`" in text for step in STEPS)
    assert "ran" not in text.replace("ran on", "").split()


def test_a_run_is_told_with_its_figures_and_faults() -> None:
    speed = {
        "status": "passed",
        "reason": "",
        "figures": {"decode_1": {"base_ms": 2.5, "task_ratio": 1.004}, "swap_host": {"us_p50": 3.25}},
        "targets": [
            {"name": "host time", "measured": 3.25, "limit": 20.0, "met": True},
            {"name": "decode", "measured": 1.2, "limit": 1.01, "met": False},
        ],
    }
    parts = {"float16, current": {"build_seconds": 17.4}}
    failed = {"status": "failed", "reason": "BackendError: no `plan`", "figures": parts, "targets": []}
    report = make_report(
        **{"ort-speed": speed, "tensorrt-rtx": failed, "tensorrt": {"status": "missing", "reason": ""}}
    )
    text = section(("gpu-planted.json", report))
    assert "Planted GPU (`sm99`), driver for CUDA 13.0" in text
    assert "swap 3.2 µs of host time, a step 2.50 ms, with a task 1.004 times" in text
    assert "| `ort-speed` | decode | 1.2 | 1.01 | **no** |" in text
    assert "float16, current: built in 17 s" in text
    assert "- `tensorrt-rtx`: `BackendError: no 'plan'`" in text
    rows = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in text.splitlines() if line.startswith("|")
    }
    assert rows["`tensorrt`"] == "never ran: not installed"
    assert rows["`cells`"] == "never ran: no time left"
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_has_words(status: str) -> None:
    step = {"status": status, "reason": "because", "figures": {}, "targets": []}
    (row,) = (line for line in section(("gpu-x.json", make_report(cells=step))).splitlines() if "`cells` |" in line)
    said = row.split("|")[3].strip()
    assert said.startswith("never ran: ") or said in ("ran", "failed", "crashed", "took too long")
    assert said.startswith("never ran") == (status in ("no device", "missing", "skipped"))


def test_the_newest_run_counts(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for name, date in (("gpu-b.json", "2026-12-01"), ("gpu-a.json", "2026-12-09"), ("gpu-c.json", "2026-11-30")):
        (tmp_path / name).write_text(json.dumps(make_report() | {"date": date}), encoding="utf-8")
    (tmp_path / "gpu-other.json").write_text("[]", encoding="utf-8")
    found = latest(tmp_path)
    assert found is not None
    assert found[0] == "gpu-a.json"


def test_the_part_is_written_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    update(page, None)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{section(None)}\n{END}\nafter\n"
    assert written(page) == section(None)
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="has no marks"):
        update(page, None)
