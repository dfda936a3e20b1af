"""KV cache on the device: static, updated in place; or dynamic, copied and grown by every pass."""

from __future__ import annotations

from typing import Protocol

from adalink.runtime.device.protocols import SIZES, DeviceArena, Executor, Queue
from adalink.runtime.implements import implements
from adalink.runtime.storage.manifest import Cache


class DeviceCache(Protocol):
    """Keys and values of one batch; the first ``length`` positions are filled."""

    length: int

    def bind(self, executor: Executor, rows: int, added: int) -> None:
        """Bind the cache for a pass that adds ``added`` positions to each of the first ``rows`` rows."""
        ...

    def advance(self, added: int) -> None:
        """Record that such a pass was enqueued."""
        ...

    def move(self, queue: Queue, source: int, target: int) -> None:
        """Copy row ``source`` over row ``target``."""
        ...


class StaticDeviceCache:
    """Static cache: one buffer of maximal size for each tensor, input and output at one address."""

    def __init__(self, arena: DeviceArena, cache: Cache, dtype: str, batch: int, capacity: int) -> None:
        self._names = list(cache.names())
        self._shape = (cache.kv_heads, capacity, cache.head_dim)
        self._row_bytes = cache.kv_heads * capacity * cache.head_dim * SIZES[dtype]
        self._addresses = _allocate(arena, len(self._names), batch * self._row_bytes)
        self.length = 0

    @implements(DeviceCache)
    def bind(self, executor: Executor, rows: int, added: int) -> None:
        for (past, present), address in zip(self._names, self._addresses, strict=True):
            executor.bind(past, address, (rows, *self._shape))
            executor.bind(present, address, (rows, *self._shape))

    @implements(DeviceCache)
    def advance(self, added: int) -> None:
        self.length += added

    @implements(DeviceCache)
    def move(self, queue: Queue, source: int, target: int) -> None:
        for address in self._addresses:
            queue.copy(address + target * self._row_bytes, address + source * self._row_bytes, self._row_bytes)


class DynamicDeviceCache:
    """Dynamic cache: two buffers of maximal size for each tensor; a pass reads one and writes the other."""

    def __init__(self, arena: DeviceArena, cache: Cache, dtype: str, batch: int, capacity: int) -> None:
        self._names = list(cache.names())
        self._heads, self._width = cache.kv_heads, cache.head_dim
        self._position_bytes = cache.kv_heads * cache.head_dim * SIZES[dtype]
        size = batch * capacity * self._position_bytes
        self._current, self._other = (_allocate(arena, len(self._names), size) for _ in range(2))
        self.length = 0

    @implements(DeviceCache)
    def bind(self, executor: Executor, rows: int, added: int) -> None:
        for (past, present), old, new in zip(self._names, self._current, self._other, strict=True):
            executor.bind(past, old, (rows, self._heads, self.length, self._width))
            executor.bind(present, new, (rows, self._heads, self.length + added, self._width))

    @implements(DeviceCache)
    def advance(self, added: int) -> None:
        self._current, self._other = self._other, self._current
        self.length += added

    @implements(DeviceCache)
    def move(self, queue: Queue, source: int, target: int) -> None:
        row_bytes = self.length * self._position_bytes
        for address in self._current:
            queue.copy(address + target * row_bytes, address + source * row_bytes, row_bytes)


def _allocate(arena: DeviceArena, count: int, size_bytes: int) -> list[int]:
    """Addresses in one allocation, each aligned to 256 bytes."""
    aligned = -(-size_bytes // 256) * 256
    first = arena.allocate(count * aligned)
    return [first + index * aligned for index in range(count)]
