"""Main memory behind the protocols of a device, with ONNX Runtime on its CPU provider as the engine.

Not a mock: what is enqueued is computed by another engine from the same graphs, at the addresses and in the shapes that
were bound. Recording is as strict as a GPU's: a record holds addresses and shapes and sees nothing that is bound later.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from packaging.version import Version

from adalink.export.adapter.embedder_graph import EMBEDDERS, build_embedder_graph
from adalink.export.engine.graph import engine_graph
from adalink.runtime.device.adapter_weights import DeviceSharedAdapterGraph
from adalink.runtime.device.engine import DeviceEngine
from adalink.runtime.device.protocols import DeviceArena
from adalink.runtime.device.vision import DeviceVision
from adalink.runtime.device.workspace import VISION
from adalink.runtime.engine import VisionGraph
from adalink.runtime.errors import BackendError
from adalink.runtime.ort.gpu_executor import OnnxRuntimeExecutor
from adalink.runtime.ort.vision import OnnxVisionGraph
from adalink.runtime.profile import Profile
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase

HAS_TENSOR_SCATTER = Version(ort.__version__) >= Version("1.24")


class HostQueue:
    """Does work at once, or records it."""

    def __init__(self) -> None:
        self._recording: list[Callable[[], None]] | None = None
        self.replays = 0
        self.handle = id(self)
        self.records = 0
        self.is_open = True

    def submit(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.submit(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        self.submit(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self.submit(lambda: ctypes.memmove(target, source, size_bytes))

    def wait(self) -> None:
        assert self._recording is None, "a recording queue cannot be waited for"

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        recorded: list[Callable[[], None]] = []
        self._recording = recorded
        self.records += 1
        try:
            work()
        finally:
            self._recording = None

        def replay() -> None:
            self.replays += 1
            for part in recorded:
                part()

        return replay

    def close(self) -> None:
        self.is_open = False


class HostDevice:
    """Counts what is allocated; ``limit_bytes`` is how much there is, ``fresh`` what every byte of new memory holds."""

    def __init__(self, limit_bytes: int | None = None, fresh: int = 0) -> None:
        self._fresh = fresh
        self._blocks: dict[int, tuple[Any, int]] = {}
        self.limit_bytes = limit_bytes
        self.queues: list[HostQueue] = []

    @property
    def allocated_bytes(self) -> int:
        return sum(size for _, size in self._blocks.values())

    @property
    def open_queues(self) -> int:
        return sum(queue.is_open for queue in self.queues)

    def allocate(self, size_bytes: int) -> int:
        if self.limit_bytes is not None and self.allocated_bytes + size_bytes > self.limit_bytes:
            raise BackendError(f"out of memory: {size_bytes} bytes")
        block = np.full(size_bytes + 256, self._fresh, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self._blocks[address] = (block, size_bytes)
        return address

    def free(self, address: int) -> None:
        del self._blocks[address]

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def open_queue(self) -> HostQueue:
        self.queues.append(HostQueue())
        return self.queues[-1]


class HostExecutor(OnnxRuntimeExecutor):
    """The kit's own executor, with what is bound frozen while its queue records."""

    def __init__(self, session: ort.InferenceSession, queue: HostQueue) -> None:
        super().__init__(session, ort, "graph", "cpu")
        self._queue = queue
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.is_closed = False

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        super().bind(name, address, shape)
        self._bound[name] = (address, shape)

    def enqueue(self) -> None:
        if not self._queue.is_recording:
            super().enqueue()
            return
        frozen = OnnxRuntimeExecutor(self._session, ort, "graph", "cpu")
        for name, (address, shape) in self._bound.items():
            frozen.bind(name, address, shape)
        self._queue.submit(frozen.enqueue)

    def close(self) -> None:
        super().close()
        self.is_closed = True


class HostPlans:
    """Graphs by name, and the profile they are used within: a shape outside it is an error, as with a real engine."""

    def __init__(self, graphs: dict[str, bytes | str], profile: Profile, *, rank: int = 64, slots: int = 64) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._sessions = {
            name: ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            for name, graph in graphs.items()
        }
        self.profile = profile
        self.largest_rank = rank
        self.largest_slots = slots
        self.opened: list[HostExecutor] = []

    def executor(self, name: str, profile: int, arena: DeviceArena) -> HostExecutor:
        self.opened.append(HostExecutor(self._sessions[name], arena.queue))
        return self.opened[-1]

    def close(self) -> None:
        self._sessions.clear()


class HostBackend:
    """Opens the engine that an engine folder would hold, on main memory."""

    name = "onnxruntime-cpu"

    def __init__(self, profile: Profile, *, in_place: bool = True, slots: int = 64, **device: Any) -> None:
        self.profile = profile
        self.in_place = in_place
        self.slots = slots
        self.device = HostDevice(**device)
        self.plans: HostPlans | None = None

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> DeviceEngine:
        if self.in_place and base.cache and not HAS_TENSOR_SCATTER:
            pytest.skip(f"ONNX Runtime {ort.__version__} has no TensorScatter; 1.24 has")
        model = engine_graph(graph, base, self.profile.capacity if self.in_place and base.cache else None)
        # Beside the portable graph, whose file of weights it refers to.
        path = graph.with_name(f"engine-{self.in_place}-{self.profile.capacity}.onnx")
        path.write_bytes(model.SerializeToString())
        graphs: dict[str, bytes | str] = {
            embedder: build_embedder_graph(embedder, base).SerializeToString() for embedder in EMBEDDERS
        }
        self.plans = HostPlans({"engine": str(path), **graphs}, self.profile, slots=self.slots)
        return DeviceEngine(self.device, self.plans, base, table)

    def open_bank(self, kind: str, graph: bytes, base: Base) -> DeviceSharedAdapterGraph:
        return DeviceSharedAdapterGraph(kind)

    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        """The tower on the device if the profile has images; else as where an engine has no plan of it."""
        if self.profile.images is None:
            return OnnxVisionGraph(graph, base)
        return DeviceVision(self.device, HostPlans({VISION: str(graph)}, self.profile), base)
