"""CUDA device and stream, through NVIDIA's bindings of the CUDA runtime (`cuda-python <https://nvidia.github.io/cuda-python>`_)."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.device.protocols import Device, Queue
from adalink.runtime.errors import BackendError, BackendUnavailableError
from adalink.runtime.implements import implements

_ADVICE = "run 'adalink doctor'"


def load_cuda(backend: str) -> Any:
    """The module ``cuda.bindings.runtime``, with a GPU to use it on.

    Raises:
        BackendUnavailableError: the bindings, the driver or the GPU are missing; the message says which.
    """
    try:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]  # of the extras for GPUs
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend {backend} needs NVIDIA's cuda-bindings, which are not installed: pip install cuda-bindings"
        ) from error
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not count:
        words = _words(runtime, status) if status != runtime.cudaError_t.cudaSuccess else "no device was found"
        raise BackendUnavailableError(
            f"backend {backend} needs an NVIDIA GPU and its driver, CUDA says: {words}. Install or update the driver, "
            f"then {_ADVICE}; --backend onnxruntime-cpu needs neither"
        )
    return runtime


class CudaDevice:
    """See ``adalink.runtime.device.protocols.Device``: the first visible GPU.

    Attributes:
        not_recording: held while a queue records, and by whatever may wait for the whole device, such as taking memory
            or opening an execution context: CUDA allows neither beside a recording.
    """

    def __init__(self, backend: str) -> None:
        """Raises ``BackendUnavailableError`` where there is no GPU."""
        self._attach(load_cuda(backend))

    def _attach(self, cuda: Any) -> None:
        self._cuda = cuda
        self.not_recording = threading.RLock()
        self._sizes: dict[int, int] = {}
        # What an engine that could not be opened, or was never closed, has left.
        weakref.finalize(self, _free_all, cuda, self._sizes)

    @implements(Device)
    def allocate(self, size_bytes: int) -> int:
        with self.not_recording:
            address = self._take(size_bytes)
            self._sizes[address] = size_bytes
            queue = self.open_queue()
            try:
                queue.clear(address, size_bytes)
            finally:
                queue.close()
        return address

    def _take(self, size_bytes: int) -> int:
        cuda = self._cuda
        error, address = cuda.cudaMalloc(size_bytes)
        if error == cuda.cudaError_t.cudaErrorMemoryAllocation:
            cuda.cudaGetLastError()  # it would be told again by the next call
            _, free, total = cuda.cudaMemGetInfo()
            raise BackendError(
                f"the GPU's memory is full: {size_bytes / 1e6:.1f} MB asked for, {free / 1e6:.1f} of {total / 1e6:.1f} "
                "MB free; close other programs, or build the engine with a smaller --profile (batch, past, images)"
            )
        self.check(error)
        return int(address)

    def free(self, address: int) -> None:
        """See ``Device``; an error here has been reported by what caused it."""
        with self.not_recording:
            if self._sizes.pop(address, None) is not None:
                self._cuda.cudaFree(address)

    @implements(Device)
    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Array:
        cuda, kind = self._cuda, np.dtype(dtype)
        size = max(int(np.prod(shape)) * kind.itemsize, 1)
        error, address = cuda.cudaHostAlloc(size, cuda.cudaHostAllocDefault)
        self.check(error)
        memory: Any = (ctypes.c_char * size).from_address(int(address))
        ctypes.memset(int(address), 0, size)
        # Every array over this memory keeps ``memory`` alive, so it is given back with the last of them.
        weakref.finalize(memory, cuda.cudaFreeHost, int(address))
        return np.frombuffer(memory, kind, int(np.prod(shape))).reshape(shape)

    @implements(Device)
    def open_queue(self) -> CudaQueue:
        error, stream = self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking)
        self.check(error)
        return CudaQueue(self, self._cuda, stream)

    def check(self, error: Any) -> None:
        """Raise ``BackendError`` for what is not success."""
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise BackendError(f"CUDA refused: {_words(self._cuda, error)}; {_ADVICE}, then start the program again")


class CudaQueue:
    """See ``adalink.runtime.device.protocols.Queue``: a stream.

    Attributes:
        handle: the stream's address, for engines.
    """

    def __init__(self, device: CudaDevice, cuda: Any, stream: Any) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = stream
        self.handle = int(stream)

    @implements(Queue)
    def upload(self, address: int, array: Array) -> None:
        self._copy(address, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    @implements(Queue)
    def download(self, array: Array, address: int) -> None:
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    @implements(Queue)
    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self._copy(target, source, size_bytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def _copy(self, target: int, source: int, size_bytes: int, kind: Any) -> None:
        self._device.check(self._cuda.cudaMemcpyAsync(target, source, size_bytes, kind, self._stream)[0])

    def clear(self, address: int, size_bytes: int) -> None:
        """Fill memory with zeros, and wait until it is."""
        self._device.check(self._cuda.cudaMemsetAsync(address, 0, size_bytes, self._stream)[0])
        self.wait()

    @implements(Queue)
    def wait(self) -> None:
        self._device.check(self._cuda.cudaStreamSynchronize(self._stream)[0])

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """See ``Queue``: a CUDA graph."""
        with self._device.not_recording:
            return self._record(work)

    def _record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._device.check(cuda.cudaStreamBeginCapture(self._stream, mode)[0])
        is_recorded = False
        try:
            with suppress(BackendError):  # something in it cannot be recorded
                work()
                is_recorded = True
        finally:
            error, graph = cuda.cudaStreamEndCapture(self._stream)
        if not is_recorded or error != cuda.cudaError_t.cudaSuccess:
            cuda.cudaGetLastError()
            return None
        error, executable = cuda.cudaGraphInstantiate(graph, 0)
        cuda.cudaGraphDestroy(graph)
        if error != cuda.cudaError_t.cudaSuccess:
            cuda.cudaGetLastError()
            return None
        return _Replay(self._device, cuda, self._stream, executable)

    @implements(Queue)
    def close(self) -> None:
        self._cuda.cudaStreamDestroy(self._stream)


class _Replay:
    """An instantiated graph, launched by calling it."""

    def __init__(self, device: CudaDevice, cuda: Any, stream: Any, executable: Any) -> None:
        self._device = device
        self._launch = cuda.cudaGraphLaunch
        self._arguments = (executable, stream)
        weakref.finalize(self, cuda.cudaGraphExecDestroy, executable)

    def __call__(self) -> None:
        self._device.check(self._launch(*self._arguments)[0])


def _free_all(cuda: Any, sizes: dict[int, int]) -> None:
    for address in sizes:
        cuda.cudaFree(address)


def _words(cuda: Any, error: Any) -> str:
    """CUDA's name and description of an error."""
    described = cuda.cudaGetErrorString(error)[1]
    return f"{getattr(error, 'name', error)} ({described.decode() if isinstance(described, bytes) else described})"
