"""Device protocols: memory, queues of work, and executors bound to addresses.

`adalink.runtime.device.cuda` implements them for the GPU. Tests implement them with main memory and ONNX Runtime, so
that the host's decisions are tested without a GPU.
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
        shape: sizes; -1 for a dynamic one.
    """

    dtype: str
    shape: tuple[int, ...]


class Queue(Protocol):
    """A queue of device work, executed in order and asynchronously."""

    @property
    def handle(self) -> int:
        """The handle that engines take."""
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
        """Wait until all work is done; raises ``BackendError`` if any of it failed."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record what ``work`` enqueues, with its addresses and shapes, without executing it.

        Returns:
            A function that enqueues the recording and reads pinned memory again; ``None`` if ``work`` cannot be
            recorded.
        """
        ...

    def close(self) -> None:
        """Release its resources."""
        ...


class Device(Protocol):
    """Device memory and queues; safe for several threads."""

    def allocate(self, size_bytes: int) -> int:
        """Allocate zeroed memory, aligned to 256 bytes; returns its address. Raises ``BackendError`` when full."""
        ...

    def free(self, address: int) -> None:
        """Free memory."""
        ...

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A host array of zeros in pinned memory, which queues copy asynchronously."""
        ...

    def open_queue(self) -> Queue:
        """A new queue."""
        ...


class Executor(Protocol):
    """A compiled graph with one profile, on one queue; for one thread at a time."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Inputs by name."""
        ...

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Outputs by name."""
        ...

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Bind an input or output to an address and shape for the following calls; raises ``BackendError``."""
        ...

    def enqueue(self) -> None:
        """Enqueue one call with the current bindings; raises ``BackendError``."""
        ...

    def close(self) -> None:
        """Release its resources."""
        ...


SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}
NUMPY = STORED | {"int64": "<i8", "bool": "?"}


class DeviceArena:
    """Device resources of one workspace: a queue, and memory that is freed all at once. For one thread at a time.

    Attributes:
        queue: the queue of its work.
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
        """Pinned memory for ``size`` elements, with a device buffer; raises ``BackendError``."""
        flat = self._device.pinned((size,), np.dtype(NUMPY[dtype]))
        return PinnedBuffer(flat, self.allocate(max(flat.nbytes, 1)))

    def scratch(self, name: str, size_bytes: int) -> int:
        """Scratch memory that all executors of a graph share; a queue runs one call at a time."""
        if name not in self._scratch:
            self._scratch[name] = self.allocate(size_bytes)
        return self._scratch[name]

    def close(self) -> None:
        """Free everything; pinned memory lives as long as its views."""
        for address in self._addresses:
            self._device.free(address)
        self._addresses.clear()
        self.queue.close()


class PinnedBuffer:
    """Pinned host memory with a device buffer; ``upload`` copies what was written into ``host``."""

    def __init__(self, flat: Array, address: int) -> None:
        self._flat = flat
        self.address = address

    def host(self, *shape: int) -> Array:
        """The first elements as an array; calls with other shapes share the memory."""
        return self._flat[: int(np.prod(shape))].reshape(shape)

    def upload(self, queue: Queue, *shape: int) -> None:
        """Enqueue the copy of the first elements to the device."""
        queue.upload(self.address, self.host(*shape))

    def download(self, queue: Queue, *shape: int) -> None:
        """Enqueue the copy of the first elements from the device."""
        queue.download(self.host(*shape), self.address)


def as_numbers(array: Array, dtype: str) -> Array:
    """A copy in a dtype that numpy computes with: bfloat16's bits become float32."""
    return as_float32(array) if dtype == "bfloat16" else array.copy()
