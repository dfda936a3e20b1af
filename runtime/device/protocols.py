"""A device as the rest of this folder sees it: addresses, queues of work, and graphs bound to addresses.

All are small protocols. `adalink.runtime.device.cuda` is the GPU; the tests have main memory behind the same protocols,
with ONNX Runtime as the engine, so that every decision made here is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.storage.safetensors import STORED, as_float32


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    Attributes:
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"int64"`` or ``"bool"``.
        shape: sizes, -1 where a call chooses.
    """

    dtype: str
    shape: tuple[int, ...]


class Queue(Protocol):
    """Work that the device does in order, while the host goes on."""

    @property
    def handle(self) -> int:
        """What engines know it by."""
        ...

    def upload(self, address: int, array: Array) -> None:
        """Copy pinned memory to the device; raises ``BackendError``."""
        ...

    def download(self, array: Array, address: int) -> None:
        """Copy from the device into pinned memory; raises ``BackendError``."""
        ...

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copy on the device; raises ``BackendError``."""
        ...

    def wait(self) -> None:
        """Wait until all is done; raises ``BackendError`` if something of it failed."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record what ``work`` enqueues instead of doing it, with its addresses and shapes.

        Returns:
            What enqueues it all again in one call, reading the host's pinned memory anew; ``None`` if something in
            ``work`` cannot be recorded.
        """
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Device(Protocol):
    """Memory, and queues to work on it; safe for calls from several threads."""

    def allocate(self, size_bytes: int) -> int:
        """Address of new memory, zeros, aligned to 256 bytes; raises ``BackendError`` when there is not enough."""
        ...

    def free(self, address: int) -> None:
        """Give memory back."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A host array of zeros that a queue can copy from and to without the host."""
        ...

    def open_queue(self) -> Queue:
        """A new queue."""
        ...


class Executor(Protocol):
    """A compiled graph with one profile, ready to work on one queue; for one thread at a time."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What it takes."""
        ...

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """What it gives."""
        ...

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Say where an input or output lies and what its shape is in the calls that follow; raises ``BackendError``."""
        ...

    def enqueue(self) -> None:
        """Enqueue one call with what is bound now; raises ``BackendError``."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}
NUMPY = STORED | {"int64": "<i8", "bool": "?"}


class DeviceArena:
    """What one workspace has of a device: a queue, and memory that is given back all at once. For one thread at a time.

    Attributes:
        queue: where its work goes.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._addresses: list[int] = []
        self._scratch: dict[str, int] = {}
        self.queue = device.open_queue()

    def allocate(self, size_bytes: int) -> int:
        """See ``Device``."""
        address = self._device.allocate(size_bytes)
        self._addresses.append(address)
        return address

    def pinned_buffer(self, size: int, dtype: str) -> PinnedBuffer:
        """Pinned memory for so many numbers, with a place on the device; raises ``BackendError``."""
        flat = self._device.pinned((size,), np.dtype(NUMPY[dtype]))
        return PinnedBuffer(flat, self.allocate(max(flat.nbytes, 1)))

    def scratch(self, name: str, size_bytes: int) -> int:
        """Memory that all executors of a graph share, since a queue does one thing at a time."""
        if name not in self._scratch:
            self._scratch[name] = self.allocate(size_bytes)
        return self._scratch[name]

    def close(self) -> None:
        """Give everything back; what views pinned memory keeps it until it goes itself."""
        for address in self._addresses:
            self._device.free(address)
        self._addresses.clear()
        self.queue.close()


class PinnedBuffer:
    """Pinned host memory with a place on the device: what is written into ``host`` is there after ``upload``."""

    def __init__(self, flat: Array, address: int) -> None:
        self._flat = flat
        self.address = address

    def host(self, *shape: int) -> Array:
        """The first elements in a shape; a call with another shape lies over it."""
        return self._flat[: int(np.prod(shape))].reshape(shape)

    def upload(self, queue: Queue, *shape: int) -> None:
        """Enqueue the copy of the first elements to the device."""
        queue.upload(self.address, self.host(*shape))

    def download(self, queue: Queue, *shape: int) -> None:
        """Enqueue the copy of the first elements from the device."""
        queue.download(self.host(*shape), self.address)


def as_numbers(array: Array, dtype: str) -> Array:
    """A copy in a dtype numpy can compute with: bfloat16's bits become float32."""
    return as_float32(array) if dtype == "bfloat16" else array.copy()
