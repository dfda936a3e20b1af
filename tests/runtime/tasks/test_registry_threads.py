"""The task table under many threads: everything is loaded once, and a name has one owner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.runtime import random_adapter, write_adapter

from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError, UnknownTaskError
from adalink.runtime.tasks.registry import TaskRegistry

THREADS = 8
# Long enough for every other thread to come to the same place.
PAUSE_SECONDS = 0.05


@pytest.fixture
def registry(llama: Any) -> Iterator[TaskRegistry]:
    with Deployment.open(llama.folder) as opened:
        yield opened._tasks


class SlowTable(dict[str, Any]):
    """A table in which looking up takes a while, as it might where another thread is run in between."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        time.sleep(PAUSE_SECONDS)
        return found


def slow(call: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        calls.append(arguments)
        time.sleep(PAUSE_SECONDS)
        return call(*arguments)

    return run


def at_once(use: Callable[[], Any]) -> list[Any]:
    """Results or errors of one call by many threads at the same time."""
    start, results = threading.Barrier(THREADS), list[Any]()

    def run() -> None:
        start.wait()
        try:
            results.append(use())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_task_is_loaded_once(registry: TaskRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(registry, "_load", slow(registry._load, calls))
    results = at_once(lambda: registry.get("alpha"))
    assert len(calls) == 1
    assert len({id(held) for held in results}) == 1


def test_shared_adapter_graph_is_opened_once(registry: TaskRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(registry._backend, "open_bank", slow(registry._backend.open_bank, calls))
    results = at_once(lambda: registry._graph("gelu"))
    assert len(calls) == 1
    assert len({id(graph) for graph in results}) == 1


def test_name_is_added_by_one_thread_alone(registry: TaskRegistry, llama: Any, tmp_path: Path) -> None:
    settings = {"rank": 2, "activation": "relu", "bias": False, "scope": "all"}
    fingerprint = llama.adapters["alpha"].config.base_fingerprint
    folder = write_adapter(tmp_path / "new", random_adapter(fingerprint, 48, 3, **settings))
    registry._tasks = SlowTable(registry._tasks)
    results = at_once(lambda: registry.add(folder, "new"))
    assert results.count("new") == 1
    assert sum(isinstance(result, RequestError) for result in results) == THREADS - 1


def test_name_is_removed_by_one_thread_alone(registry: TaskRegistry) -> None:
    registry._tasks = SlowTable(registry._tasks)
    results = at_once(lambda: registry.remove("beta"))
    assert results.count(None) == 1
    assert sum(isinstance(result, UnknownTaskError) for result in results) == THREADS - 1


def test_size_of_the_table_is_right_after_many_changes(registry: TaskRegistry) -> None:
    """Loading and unloading at once: the books of the memory agree with what is held."""
    ends = time.monotonic() + 1

    def churn() -> None:
        while time.monotonic() < ends:
            for name in ("alpha", "beta"):
                registry.get(name)
                registry.unload(name)

    assert at_once(churn) == [None] * THREADS
    table = registry._loaded
    assert table.size == sum(held.size for held in table.entries.values())
