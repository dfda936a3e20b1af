"""CUDA's runtime on main memory, as lazy as a GPU may be: work on a stream is done when that stream is waited for.

Host code that reads before it waits, overwrites what is still to be copied, or counts on the order of two streams gets
wrong numbers here. Names and enumerations are those of NVIDIA's bindings. Rules are CUDA's: nothing captured is
executed, and a capturing thread may neither allocate nor synchronise.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from adalink.runtime.device.cuda import CudaDevice
from adalink.runtime.device.protocols import DeviceArena
from adalink.runtime.ort.gpu_executor import OnnxRuntimeExecutor
from adalink.runtime.profile import Profile

bindings: Any = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
_OK = bindings.cudaError_t.cudaSuccess
_NOT_WHILE_CAPTURING = bindings.cudaError_t.cudaErrorStreamCaptureUnsupported
_FULL = bindings.cudaError_t.cudaErrorMemoryAllocation
# What fresh memory holds: code that counts on zeros has to write them.
_FRESH = 0xA5
Work = Callable[[], None]


class LazyCuda:
    """The functions of ``cuda.bindings.runtime`` that the kit calls; everything else is the module's own.

    Attributes:
        streams: work still to be done, by stream.
        records: captures that ended.
        launches: graphs launched.
        blocks: device memory, by address.
    """

    def __init__(self, limit_bytes: int = 1 << 32) -> None:
        self.streams: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.records = self.launches = 0
        self.blocks: dict[int, tuple[Any, int]] = {}
        self._pinned: dict[int, Any] = {}
        self._limit = limit_bytes
        self._last = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(bindings, name)

    def enqueue(self, stream: int, work: Work) -> None:
        """Put work on a stream, or into its capture."""
        self.captures.get(stream, self.streams[stream]).append(work)

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        if self.captures:
            return _NOT_WHILE_CAPTURING, 0
        if size + sum(taken for _, taken in self.blocks.values()) > self._limit:
            return _FULL, 0
        block = np.full(size + 256, _FRESH, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self.blocks[address] = block, size
        return _OK, address

    def cudaFree(self, address: int) -> tuple[Any]:
        for waiting in self.streams.values():  # CUDA waits for the device
            self._drain(waiting)
        self.blocks.pop(address)
        return (_OK,)

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return _OK, self._limit, self._limit

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, int]:
        block = np.full(size, _FRESH, np.uint8)
        self._pinned[block.ctypes.data] = block
        return _OK, block.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple[Any]:
        self._pinned.pop(address)
        return (_OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        self._last += 1
        self.streams[self._last] = []
        return _OK, self._last

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        self._drain(self.streams.pop(stream))
        return (_OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        if self.captures:
            return (_NOT_WHILE_CAPTURING,)
        self._drain(self.streams[stream])
        return (_OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any]:
        self.enqueue(stream, functools.partial(ctypes.memmove, target, source, size))
        return (_OK,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        self.enqueue(stream, functools.partial(ctypes.memset, address, value, size))
        return (_OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        self.captures[stream] = []
        return (_OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, list[Work]]:
        self.records += 1
        return _OK, self.captures.pop(stream)

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Any, list[Work]]:
        return _OK, list(graph)

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Any]:
        graph.clear()
        return (_OK,)

    def cudaGraphLaunch(self, executable: list[Work], stream: int) -> tuple[Any]:
        self.launches += 1
        for work in executable:
            self.enqueue(stream, work)
        return (_OK,)

    def cudaGraphExecDestroy(self, executable: list[Work]) -> tuple[Any]:
        return (_OK,)

    def cudaGetLastError(self) -> tuple[Any]:
        return (_OK,)

    @staticmethod
    def _drain(waiting: list[Work]) -> None:
        while waiting:
            waiting.pop(0)()


def lazy_device(cuda: LazyCuda) -> CudaDevice:
    """The kit's own CUDA device on it."""
    device = CudaDevice.__new__(CudaDevice)
    device._attach(cuda)
    return device


class LazyExecutor(OnnxRuntimeExecutor):
    """Enqueues a call on its stream, with what is bound now."""

    def __init__(self, session: ort.InferenceSession, cuda: LazyCuda, stream: int) -> None:
        super().__init__(session, ort, "graph", "cpu")
        self._cuda, self._stream = cuda, stream
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        super().bind(name, address, shape)
        self._bound[name] = address, shape

    def enqueue(self) -> None:
        frozen = OnnxRuntimeExecutor(self._session, ort, "graph", "cpu")
        for name, (address, shape) in self._bound.items():
            frozen.bind(name, address, shape)
        self._cuda.enqueue(self._stream, frozen.enqueue)


class LazyPlans:
    """Graphs by name, whose calls are enqueued on the stream of the arena's queue."""

    largest_rank, largest_slots = 64, 128

    def __init__(self, cuda: LazyCuda, graphs: dict[str, bytes | str], profile: Profile) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.profile = profile
        self._cuda = cuda
        self._sessions = {
            name: ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            for name, graph in graphs.items()
        }

    def executor(self, name: str, profile: int, arena: DeviceArena) -> LazyExecutor:
        return LazyExecutor(self._sessions[name], self._cuda, arena.queue.handle)

    def close(self) -> None:
        self._sessions.clear()
