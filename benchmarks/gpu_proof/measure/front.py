"""The kit's device front end with ONNX Runtime as the executor: what TensorRT's plans run behind, without TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adalink.export.adapter.embedder_graph import EMBEDDERS, build_embedder_graph
from adalink.export.engine.graph import engine_graph
from adalink.runtime.device.adapter_weights import DeviceSharedAdapterGraph
from adalink.runtime.device.engine import DeviceEngine
from adalink.runtime.device.protocols import Device, DeviceArena
from adalink.runtime.device.workspace import ENGINE, Plans
from adalink.runtime.engine import PatchVisionGraph, VisionGraph
from adalink.runtime.errors import BackendError
from adalink.runtime.ort.errors import onnxruntime_errors, refusal
from adalink.runtime.ort.gpu_executor import OnnxRuntimeExecutor
from adalink.runtime.ort.open_session import open_session
from adalink.runtime.profile import Profile
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import PatchTower

if TYPE_CHECKING:
    import onnxruntime as ort

RANK, SLOTS = 64, 128
Graphs = dict[str, "bytes | str"]
MakePlans = Callable[[Graphs, Profile], Plans]


class FrontBackend:
    """See ``adalink.runtime.engine.Backend``: graphs of an engine folder, behind ``runtime/device``.

    Attributes:
        name: the backend whose variant is opened.
    """

    name = "onnxruntime-cuda"

    def __init__(self, device: Device, make_plans: MakePlans, profile: Profile, *, in_place: bool) -> None:
        self._device, self._make_plans, self._profile, self._in_place = device, make_plans, profile, in_place

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> DeviceEngine:
        """Write the engine's graph beside the portable one, whose weights it shares, and open it."""
        model = engine_graph(graph, base, self._profile.capacity if self._in_place else None)
        path = graph.with_name(f"engine-{'in-place' if self._in_place else 'growing'}.onnx")
        path.write_bytes(model.SerializeToString())
        graphs: Graphs = {name: build_embedder_graph(name, base).SerializeToString() for name in EMBEDDERS}
        plans = self._make_plans({ENGINE: str(path), **graphs}, self._profile)
        return DeviceEngine(self._device, plans, base, table)

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> DeviceSharedAdapterGraph:
        """The engine's embedders compute the adapters."""
        return DeviceSharedAdapterGraph(activation_key)

    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        """Never called: the bases take no images."""
        raise BackendError(f"{graph}: no images here")

    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> PatchVisionGraph:
        """Never called: the bases take no images."""
        raise BackendError(f"{graph}: no images here")


class CudaPlans:
    """See ``adalink.runtime.device.workspace.Plans``: sessions of ONNX Runtime's CUDA provider.

    With ``shares_stream`` a session computes on the queue's own stream and nothing is waited for, so that a step can be
    recorded; then each queue has sessions of its own.
    """

    largest_rank, largest_slots = RANK, SLOTS

    def __init__(
        self,
        graphs: Graphs,
        profile: Profile,
        *,
        shares_stream: bool,
        provider: str = "CUDAExecutionProvider",
        place: str = "cuda",
    ) -> None:
        """Open nothing yet; ``provider`` and ``place`` of its memory are others in tests."""
        import onnxruntime

        self.profile = profile
        self._ort: ModuleType = onnxruntime
        self._graphs, self._shares_stream = graphs, shares_stream
        self._provider, self._place = provider, place
        self._sessions: dict[tuple[str, int], Any] = {}

    def executor(self, name: str, profile: int, arena: DeviceArena) -> OnnxRuntimeExecutor:
        """An executor on the arena's queue."""
        stream = arena.queue.handle if self._shares_stream else 0
        if (name, stream) not in self._sessions:
            self._sessions[name, stream] = self._open(name, stream)
        session = self._sessions[name, stream]
        if not self._shares_stream:
            return OnnxRuntimeExecutor(session, self._ort, name, self._place, before=arena.queue.wait)
        return StreamExecutor(session, self._ort, name, self._place)

    def close(self) -> None:
        """Free the sessions."""
        self._sessions.clear()

    def _open(self, name: str, stream: int) -> ort.InferenceSession:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        settings = {"device_id": "0", "use_tf32": "0"} if self._place == "cuda" else {}
        if stream and settings:
            settings["user_compute_stream"] = str(stream)
        session = open_session(self._ort, name, self._graphs[name], options, [(self._provider, settings)])
        if session.get_providers()[0] != self._provider:
            raise BackendError(f"{name}: ONNX Runtime fell back to {session.get_providers()[0]}")
        return session


class StreamExecutor(OnnxRuntimeExecutor):
    """Enqueues on the stream that the session was given, and returns at once."""

    def enqueue(self) -> None:
        """See ``adalink.runtime.device.protocols.Executor``."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session.run_with_iobinding(self._binding, options)
        except onnxruntime_errors(self._ort) as error:
            raise refusal(self._origin, error) from error
