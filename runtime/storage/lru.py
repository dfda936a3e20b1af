"""Values in the order of their last use, within a budget: the one such table of the kit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruTable(Generic[K, V]):
    """Values by key; beyond the budget the least recently used go first.

    It has no lock. Threads may read ``entries`` and call ``touch`` while one, which holds its owner's lock, changes the
    table: each is a single operation of a C type, and a key that has gone meanwhile is a ``KeyError``. To go through
    ``entries``, or to spare keys in ``evict``, hold the lock in all of them.

    Attributes:
        entries: the values, the least recently used first; reading them is no use.
        touch: called with a key, marks its value as the most recently used; raises ``KeyError``.
        size: what the values amount to.
    """

    def __init__(
        self,
        size_of: Callable[[V], int] = lambda value: 1,
        budget: int | None = None,
        on_drop: Callable[[K, V], None] = lambda key, value: None,
    ) -> None:
        """Make an empty table.

        Args:
            size_of: size of a value, the same each time; by default values are counted.
            budget: how large the values may be together; ``None`` for no limit.
            on_drop: called with each value that is let go, except by ``clear``.
        """
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._size_of = size_of
        self._budget = budget
        self._on_drop = on_drop
        self.entries: Mapping[K, V] = self._entries
        # Not a method: a task is touched in every request, and a call into Python would cost more than the look-up.
        self.touch: Callable[[K], None] = self._entries.move_to_end
        self.size = 0

    def put(self, key: K, value: V) -> None:
        """Hold a value as the most recently used, in place of the key's old one, and let go of others to make room.

        One that is larger than the whole budget is held alone.
        """
        self.pop(key)
        size = self._size_of(value)
        while self._budget is not None and self._entries and self.size + size > self._budget:
            self.evict()
        self._entries[key] = value
        self.size += size

    def pop(self, key: K) -> V | None:
        """Let go of a key's value; ``None`` if there is none."""
        value = self._entries.pop(key, None)
        if value is not None:
            self._drop(key, value)
        return value

    def evict(self, in_use: Container[K] = ()) -> V | None:
        """Let go of the least recently used value whose key is not ``in_use``; ``None`` if there is none."""
        if in_use:
            oldest = next((key for key in self._entries if key not in in_use), None)
            return None if oldest is None else self.pop(oldest)
        if not self._entries:
            return None
        # Not by iteration, which a touch from another thread would disturb.
        key, value = self._entries.popitem(last=False)
        self._drop(key, value)
        return value

    def clear(self) -> None:
        """Let go of all values."""
        self._entries.clear()
        self.size = 0

    def _drop(self, key: K, value: V) -> None:
        self.size -= self._size_of(value)
        self._on_drop(key, value)
