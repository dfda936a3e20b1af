"""A short soak, and proof that it finds a wrong answer, lost slots and memory that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz import soak
from fuzz.soak import MOST_GROWN_KB, Soak, run_soak
from helpers.runtime import build


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soak")
    build("llama", root)
    return root


@pytest.mark.slow
def test_short_soak_finds_nothing(source: Path, tmp_path: Path) -> None:
    seen: list[Soak] = []
    found = run_soak(source, tmp_path, 12, 16, 0, seen.append)
    assert found.wrong == []
    assert found.counts["whole"] > 50
    assert min(found.counts[how] for how in ("left", "hung up", "nonsense", "not there")) > 0
    assert set(found.changes) == {"added", "exported", "replaced", "unloaded", "removed"}
    assert found.killed > 0
    assert seen


@pytest.mark.slow
def test_wrong_task_is_found(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(soak.MODELS, "beta", ["alpha"])  # as if `beta` answered under another task's weights
    found = run_soak(source, tmp_path, 3, 4, 0)
    assert any("beta on" in wrong for wrong in found.wrong)


def test_lost_slots_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        text = "adalink_requests_running 1.0\nadalink_requests_waiting 0.0"

    def get(*args: Any, **kwargs: Any) -> Answer:
        return Answer()

    monkeypatch.setattr(soak.httpx, "get", get)
    found = Soak(1)
    soak.settle(found, "", seconds=0.2)
    assert "slots were lost" in found.wrong[0]


def test_growth_is_that_of_the_halves() -> None:
    steady = [(0.0, 80_000, 0), (10.0, 120_000, 0), (20.0, 121_000, 0), (30.0, 119_000, 0)]
    assert Soak(1, seconds=30, samples=steady).grown_kb == 1000
    growing = [(0.0, 80_000, 0), (10.0, 120_000, 0), (20.0, 150_000, 0), (30.0, 190_000, 0)]
    assert Soak(1, seconds=30, samples=growing).grown_kb > MOST_GROWN_KB
    assert Soak(1, seconds=30).grown_kb == 0
