"""Slot table: which task's weights are in which slot of a device pool."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from adalink.runtime.storage.lru import LruTable

K = TypeVar("K", bound=Hashable)


class SlotTable(Generic[K]):
    """Slots 1 to ``size - 1`` of a pool; slot 0 is reserved. A slot in use is never reassigned.

    For one thread at a time.
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
        """Use a slot for ``key`` until ``release``.

        Returns:
            The slot, and whether it is newly assigned and must be filled; ``None`` if all slots are in use. Without a
            free slot, the least recently used key loses its slot.
        """
        slot = self._slots.get(key)
        is_new = slot is None
        if slot is None:
            slot = self._free.pop() if self._free else self._slots.evict(in_use=self._users)
            if slot is None:
                return None
            self._slots.put(key, slot)
        self._users[key] = self._users.get(key, 0) + 1
        return slot, is_new

    def release(self, key: K) -> None:
        """End one use of a slot; its contents stay until the slot is reassigned."""
        left = self._users[key] - 1
        if left:
            self._users[key] = left
        else:
            del self._users[key]

    def forget(self, key: K) -> None:
        """Undo a ``take`` whose slot could not be filled."""
        slot = self._slots.pop(key)
        if slot is not None:
            self._free.append(slot)
        self.release(key)
