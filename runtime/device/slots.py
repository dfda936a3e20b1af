"""Which set of weights lies in which place of a stack on the device."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from adalink.runtime.storage.lru import LruTable

K = TypeVar("K", bound=Hashable)


class SlotTable(Generic[K]):
    """Places 1 to ``size - 1`` of a stack; place 0 is nobody's. A place in use is never given to another.

    Not safe for use from several threads at a time.
    """

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, 0, -1))
        self._slots: LruTable[K, int] = LruTable()
        self._users: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._slots.entries)

    def __contains__(self, key: K) -> bool:
        return key in self._slots.entries

    def take(self, key: K) -> tuple[int, bool] | None:
        """Use a place for ``key`` until ``release``.

        Returns:
            The place, and whether it was another's or nobody's so that it must be filled; ``None`` if all are in use.
            Without a free place it is that of the one who was not used for the longest time.
        """
        slot = self._slots.entries.get(key)
        is_new = slot is None
        if slot is None:
            slot = self._free.pop() if self._free else self._slots.evict(in_use=self._users)
            if slot is None:
                return None
            self._slots.put(key, slot)
        self._slots.touch(key)
        self._users[key] = self._users.get(key, 0) + 1
        return slot, is_new

    def release(self, key: K) -> None:
        """End one use of a place; what lies there stays until another needs the place."""
        left = self._users[key] - 1
        if left:
            self._users[key] = left
        else:
            del self._users[key]

    def forget(self, key: K) -> None:
        """Undo a ``take`` whose place could not be filled."""
        slot = self._slots.pop(key)
        if slot is not None:
            self._free.append(slot)
        self.release(key)
