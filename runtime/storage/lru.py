"""LRU table: values by key within a size budget; the least recently used are evicted first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Held(Generic[V]):
    """A value, its size, and the time of its last use by the table's clock."""

    __slots__ = ("last_used", "size", "value")

    def __init__(self, value: V, size: int, last_used: int) -> None:
        self.value = value
        self.size = size
        self.last_used = last_used


class LruTable(Generic[K, V]):
    """Values by key; beyond the budget, the least recently used are evicted first.

    A use writes one number. Moving list nodes instead would touch three cold cache lines. Keys are sorted by last use
    only when an eviction needs it. Threads may therefore read without a lock; ``put``, ``pop`` and ``evict`` need the
    owner's lock.

    Attributes:
        entries: the values with their last use. The fastest readers skip ``get`` and set
            ``held.last_used = next(table.clock)`` themselves.
        clock: counts uses.
        size: total size of the values.
    """

    def __init__(
        self, budget: int | None = None, on_drop: Callable[[K, Held[V]], None] = lambda key, held: None
    ) -> None:
        """Make an empty table.

        Args:
            budget: limit of the total size; ``None`` for no limit.
            on_drop: called with each value that is removed, except by ``clear``.
        """
        self._entries: dict[K, Held[V]] = {}
        self._budget = budget
        self._on_drop = on_drop
        # Keys with their last use at the time of sorting, the latest first.
        self._by_age: list[tuple[int, K]] = []
        self.entries: Mapping[K, Held[V]] = self._entries
        self.clock: Iterator[int] = itertools.count(1)
        self.size = 0

    def get(self, key: K) -> V | None:
        """The key's value, now the most recently used; ``None`` if there is none."""
        held = self._entries.get(key)
        if held is None:
            return None
        held.last_used = next(self.clock)
        return held.value

    def put(self, key: K, value: V, size: int = 1) -> Held[V]:
        """Store a value as the most recently used, replacing the key's old one, and evict others beyond the budget.

        A value larger than the budget is stored alone.
        """
        self.pop(key)
        while self._budget is not None and self._entries and self.size + size > self._budget:
            self.evict()
        held = self._entries[key] = Held(value, size, next(self.clock))
        self.size += size
        return held

    def pop(self, key: K) -> V | None:
        """Remove and return a key's value; ``None`` if there is none."""
        held = self._entries.pop(key, None)
        if held is None:
            return None
        self.size -= held.size
        self._on_drop(key, held)
        return held.value

    def evict(self, in_use: Container[K] = ()) -> V | None:
        """Evict the least recently used value whose key is not ``in_use``; ``None`` if there is none."""
        for is_sorted_anew in (False, True):
            if is_sorted_anew:
                ages = [(held.last_used, key) for key, held in self._entries.items()]
                self._by_age = sorted(ages, key=lambda age: age[0], reverse=True)
            # Entries unused since the sorting are older than all others.
            for index in range(len(self._by_age) - 1, -1, -1):
                last_used, key = self._by_age[index]
                held = self._entries.get(key)
                if held is None or held.last_used != last_used:
                    del self._by_age[index]
                elif key not in in_use:
                    del self._by_age[index]
                    return self.pop(key)
        return None

    def clear(self) -> None:
        """Remove all values."""
        self._entries.clear()
        self._by_age.clear()
        self.size = 0
