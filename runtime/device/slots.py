"""Which set of weights lies in which place of a stack on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class SlotTable(Generic[K]):
    """Places 1 to ``size - 1`` of a stack; place 0 is nobody's. A place in use is never given to another.

    Not safe for use from several threads at a time.
    """

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, 0, -1))
        self._slots: OrderedDict[K, int] = OrderedDict()
        self._users: dict[K, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: K) -> bool:
        return key in self._slots

    def take(self, key: K) -> tuple[int, bool] | None:
        """Use a place for ``key`` until ``release``.

        Returns:
            The place, and whether it was another's or nobody's so that it must be filled; ``None`` if all are in use.
            Without a free place it is that of the one who was not used for the longest time.
        """
        slot = self._slots.get(key)
        is_new = slot is None
        if slot is None:
            if not self._free and not self._evict():
                return None
            slot = self._slots[key] = self._free.pop()
        self._slots.move_to_end(key)
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
        self._free.append(self._slots.pop(key))
        self.release(key)

    def _evict(self) -> bool:
        oldest = next((key for key in self._slots if key not in self._users), None)
        if oldest is None:
            return False
        self._free.append(self._slots.pop(oldest))
        return True
