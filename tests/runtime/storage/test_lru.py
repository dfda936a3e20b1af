"""The table of recently used values, against a model that keeps a list and adds sizes up anew each time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Container

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adalink.runtime.storage.lru import LruTable

KEYS = st.sampled_from("abcdefg")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 12)),
        st.tuples(st.sampled_from(["get", "pop"]), KEYS),
        st.tuples(st.just("evict"), st.frozensets(KEYS)),
        st.tuples(st.just("clear")),
    ),
    max_size=60,
)


class Model:
    """Pairs of key and size in a list, the least recently used first."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self.pairs: list[tuple[str, int]] = []

    def apply(self, step: tuple) -> object:  # type: ignore[type-arg]  # steps differ in length
        name, *arguments = step
        return getattr(self, name)(*arguments)

    def put(self, key: str, size: int) -> None:
        self.pop(key)
        while self.budget is not None and self.pairs and sum(own for _, own in self.pairs) + size > self.budget:
            del self.pairs[0]
        self.pairs.append((key, size))

    def get(self, key: str) -> int | None:
        size = self.pop(key)
        if size is not None:
            self.pairs.append((key, size))
        return size

    def pop(self, key: str) -> int | None:
        found = [own for name, own in self.pairs if name == key]
        self.pairs = [pair for pair in self.pairs if pair[0] != key]
        return found[0] if found else None

    def evict(self, in_use: frozenset[str]) -> int | None:
        idle = [key for key, _ in self.pairs if key not in in_use]
        return self.pop(idle[0]) if idle else None

    def clear(self) -> None:
        self.pairs = []


def run(table: LruTable[str, int], steps: list[tuple], budget: int | None) -> None:  # type: ignore[type-arg]
    model = Model(budget)
    for step in steps:
        if step[0] == "put":
            assert table.put(step[1], step[2], step[2]) is table.entries[step[1]]
            model.apply(step)
        else:
            assert getattr(table, step[0])(*step[1:]) == model.apply(step), step
        held = sorted(table.entries.items(), key=lambda entry: entry[1].last_used)
        assert [(key, own.value) for key, own in held] == model.pairs, step
        assert table.size == sum(own for _, own in model.pairs), step


@given(STEPS, st.none() | st.integers(0, 30))
def test_order_and_size_are_those_of_the_model(steps: list[tuple], budget: int | None) -> None:  # type: ignore[type-arg]
    run(LruTable(budget), steps, budget)


class Unordered(LruTable[str, int]):
    """Planted: a use is not noticed."""

    def get(self, key: str) -> int | None:
        held = self._entries.get(key)
        return None if held is None else held.value


class Forgetful(LruTable[str, int]):
    """Planted: the size of a value that is replaced is counted for ever."""

    def pop(self, key: str) -> int | None:
        held = self._entries.pop(key, None)
        return None if held is None else held.value


class Stale(LruTable[str, int]):
    """Planted: uses since the keys were sorted do not count."""

    def evict(self, in_use: Container[str] = ()) -> int | None:
        while self._by_age:
            _, key = self._by_age.pop()
            if key in self._entries and key not in in_use:
                return self.pop(key)
        return super().evict(in_use)


def test_planted_faults_are_found() -> None:
    steps = [("put", "a", 9), ("put", "b", 9), ("get", "a"), ("put", "a", 5), ("put", "c", 9)]
    steps += [("get", "a"), ("put", "d", 9)]
    for broken in (Unordered(20), Forgetful(20), Stale(20)):
        with pytest.raises(AssertionError):
            run(broken, steps, 20)
    run(LruTable(20), steps, 20)


def test_value_larger_than_the_budget_is_held_alone() -> None:
    table: LruTable[str, int] = LruTable(10)
    for key, size in (("a", 4), ("b", 4), ("large", 99)):
        table.put(key, size, size)
    assert (list(table.entries), table.size) == (["large"], 99)
    table.put("a", 4, 4)
    assert (list(table.entries), table.size) == (["a"], 4)


def test_nothing_is_let_go_while_all_are_in_use() -> None:
    table: LruTable[str, int] = LruTable()
    for key in "abc":
        table.put(key, ord(key))
    assert table.evict(in_use="abc") is None
    assert table.evict(in_use="ac") == ord("b")
    assert table.evict(in_use="a") == ord("c"), "one that was spared is found again"


def test_threads_use_values_without_a_lock_while_one_at_a_time_changes_the_table() -> None:
    table: LruTable[int, int] = LruTable(80)
    lock, failures = threading.Lock(), list[str]()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for key in rng.integers(0, 12, 3000).tolist():
                value = table.get(key)
                if value is None:
                    with lock:
                        table.put(key, key, 10)
                elif value != key:
                    failures.append(f"{key} has another's value")
        except Exception as error:
            failures.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert table.size == 10 * len(table.entries) == 80
