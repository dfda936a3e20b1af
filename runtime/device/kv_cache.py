"""The KV cache on the device: where each layer's keys and values lie, in the two ways an engine may keep them."""

from __future__ import annotations

from typing import Protocol

from adalink.runtime.device.protocols import SIZES, DeviceArena, Executor, Queue
from adalink.runtime.storage.manifest import Cache


class DeviceCache(Protocol):
    """Keys and values of the rows of one batch. ``length`` positions of it hold something."""

    length: int

    def bind(self, executor: Executor, rows: int, added: int) -> None:
        """Bind the cache's inputs and outputs for a pass that adds positions to each of the first rows."""
        ...

    def advance(self, added: int) -> None:
        """Say that such a pass was enqueued."""
        ...

    def move(self, queue: Queue, source: int, target: int) -> None:
        """Let a row take another's place."""
        ...


class StaticDeviceCache:
    """One buffer of the largest size a tensor, input and output at one address; a pass writes its positions alone."""

    def __init__(self, arena: DeviceArena, cache: Cache, dtype: str, batch: int, capacity: int) -> None:
        self._names = list(cache.names())
        self._shape = (cache.kv_heads, capacity, cache.head_dim)
        self._row_bytes = cache.kv_heads * capacity * cache.head_dim * SIZES[dtype]
        self._addresses = _allocate(arena, len(self._names), batch * self._row_bytes)
        self.length = 0

    def bind(self, executor: Executor, rows: int, added: int) -> None:
        """See ``DeviceCache``."""
        for (past, present), address in zip(self._names, self._addresses, strict=True):
            executor.bind(past, address, (rows, *self._shape))
            executor.bind(present, address, (rows, *self._shape))

    def advance(self, added: int) -> None:
        """See ``DeviceCache``."""
        self.length += added

    def move(self, queue: Queue, source: int, target: int) -> None:
        """See ``DeviceCache``."""
        for address in self._addresses:
            queue.copy(address + target * self._row_bytes, address + source * self._row_bytes, self._row_bytes)


class DynamicDeviceCache:
    """Two buffers of the largest size a tensor: a pass reads one and writes it, longer, into the other."""

    def __init__(self, arena: DeviceArena, cache: Cache, dtype: str, batch: int, capacity: int) -> None:
        self._names = list(cache.names())
        self._heads, self._width = cache.kv_heads, cache.head_dim
        self._position_bytes = cache.kv_heads * cache.head_dim * SIZES[dtype]
        size = batch * capacity * self._position_bytes
        self._current, self._other = (_allocate(arena, len(self._names), size) for _ in range(2))
        self.length = 0

    def bind(self, executor: Executor, rows: int, added: int) -> None:
        """See ``DeviceCache``."""
        for (past, present), old, new in zip(self._names, self._current, self._other, strict=True):
            executor.bind(past, old, (rows, self._heads, self.length, self._width))
            executor.bind(present, new, (rows, self._heads, self.length + added, self._width))

    def advance(self, added: int) -> None:
        """See ``DeviceCache``."""
        self._current, self._other = self._other, self._current
        self.length += added

    def move(self, queue: Queue, source: int, target: int) -> None:
        """See ``DeviceCache``."""
        row_bytes = self.length * self._position_bytes
        for address in self._current:
            queue.copy(address + target * row_bytes, address + source * row_bytes, row_bytes)


def _allocate(arena: DeviceArena, count: int, size_bytes: int) -> list[int]:
    """Addresses in one allocation, each aligned to 256 bytes."""
    aligned = -(-size_bytes // 256) * 256
    first = arena.allocate(count * aligned)
    return [first + index * aligned for index in range(count)]
