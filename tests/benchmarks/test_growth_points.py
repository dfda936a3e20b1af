"""One point of how cost grows: the four figures of a machine whose time and memory are known."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.slopes import BATCH_PROMPT, STEP_PROMPT

PROMPT_S, STEP_S, SWAP_S = 2e-3, 7e-4, 5e-6  # of a token, of a row and step, of a token
TASK_BYTES, TABLE_BYTES, CACHE_BYTES = 75_000, 3_000, 400  # of a task, of a token's row, of a position


class Machine:
    """A deployment that takes time and memory by rule; what only a first request takes is much more."""

    def __init__(self, tasks: int) -> None:
        self.tasks = [f"task-{number}" for number in range(tasks)]
        self.manifest = SimpleNamespace(
            tasks={name: SimpleNamespace(config=f"tasks/{name}/adapter_config.json") for name in self.tasks},
            base=SimpleNamespace(vocab_size=64),
        )
        self.tokenizer = SimpleNamespace(encode=list)  # a token a letter
        self.now, self.resident, self.peak = 0.0, 10**6, 10**9
        self.loaded, self.seen, self.added, self.swaps = set[str](), set[int](), list[str](), 0

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add_task(self, folder: Path, name: str) -> str:
        self.added.append(f"{folder} {name}")
        self.resident += 5 * 10**7
        return name

    def remove_task(self, name: str) -> None:
        self.added.append(f"without {name}")

    def input_embeddings(self, ids: list[list[int]], tasks: str | list[str] | None = None) -> None:
        names = {tasks} if isinstance(tasks, str) else set(tasks or ())
        self.resident += TASK_BYTES * len(names - self.loaded)
        self.resident += TABLE_BYTES * len({token for row in ids for token in row} - self.seen)
        self.loaded |= names
        self.seen |= {token for row in ids for token in row}
        self.swaps += bool(names)
        self.now += SWAP_S * sum(map(len, ids))

    def generate(self, prompts: list[str], *, tasks: list[str], max_new_tokens: int, draft_tokens: int) -> None:
        assert len(tasks) == len(prompts)
        assert draft_tokens == 0
        self.now += sum(map(len, prompts)) * PROMPT_S + (max_new_tokens - 1) * len(prompts) * STEP_S
        self.peak = max(self.peak, self.resident + CACHE_BYTES * sum(map(len, prompts)))

    def reset_peak(self) -> None:
        self.peak = self.resident


def measure(monkeypatch: pytest.MonkeyPatch, series: str, x: int, tasks: int) -> tuple[Machine, dict[str, float]]:
    machine = Machine(tasks)
    monkeypatch.setattr(growth, "Deployment", SimpleNamespace(open=lambda path, threads: machine))
    monkeypatch.setattr(growth, "time", SimpleNamespace(perf_counter=lambda: machine.now))
    monkeypatch.setattr(growth, "resident_bytes", lambda: machine.resident)
    monkeypatch.setattr(growth, "peak_bytes", lambda: machine.peak)
    monkeypatch.setattr(growth, "reset_peak", machine.reset_peak)
    return machine, growth.measure(Path("here"), series, x, 1, 3)


@pytest.mark.parametrize(
    ("series", "x", "tasks", "rows", "length", "swapped", "memory"),
    [
        ("tasks", 10, 10, 1, STEP_PROMPT, 1, 10 * TASK_BYTES + TABLE_BYTES),
        ("tasks", 1, 1, 1, STEP_PROMPT, 1, TASK_BYTES + TABLE_BYTES),
        ("rank", 64, 18, 1, STEP_PROMPT, 1, TASK_BYTES + TABLE_BYTES / 18),
        ("sequence", 300, 4, 1, 300, 300, 300 * CACHE_BYTES),
        ("batch", 4, 6, 4, BATCH_PROMPT, 4, 4 * BATCH_PROMPT * CACHE_BYTES),
    ],
)
def test_figures_by_hand(
    monkeypatch: pytest.MonkeyPatch,
    series: str,
    x: int,
    tasks: int,
    rows: int,
    length: int,
    swapped: int,
    memory: float,
) -> None:
    machine, point = measure(monkeypatch, series, x, tasks)
    assert point["prefill_ms"] == pytest.approx(1e3 * rows * length * PROMPT_S)
    assert point["decode_ms"] == pytest.approx(1e3 * rows * STEP_S)
    assert point["swap_us"] == pytest.approx(1e6 * swapped * SWAP_S)
    assert point["memory_bytes"] == pytest.approx(memory)
    assert machine.added == ["here/tasks/task-0 first", "without first"]
    assert machine.swaps == tasks + growth._SWITCHES


def test_swaps_that_are_slow_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SWAP_S", 2.0)
    machine, point = measure(monkeypatch, "tasks", 3, 3)
    assert point["swap_us"] == pytest.approx(2e6)
    assert machine.swaps == 3 + 3  # the third ends behind the limit of five seconds


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot count anew")
def test_the_peak_is_that_of_memory_given_back_since() -> None:
    def touch(size: int) -> None:
        pages = mmap.mmap(-1, size)
        np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE] = 1

    touch(96 << 20)
    growth.reset_peak()
    before = growth.peak_bytes()
    assert before == pytest.approx(growth.resident_bytes(), abs=8 << 20)
    touch(64 << 20)
    assert growth.peak_bytes() - before == pytest.approx(64 << 20, abs=8 << 20)
    assert growth.resident_bytes() - before < 8 << 20
