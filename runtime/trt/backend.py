"""Engines of TensorRT and TensorRT-RTX: plans are read, checked, and run where they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from adalink.runtime.device.adapter_weights import DeviceSharedAdapterGraph
from adalink.runtime.device.cuda import CudaDevice
from adalink.runtime.device.engine import DeviceEngine
from adalink.runtime.device.protocols import DeviceArena
from adalink.runtime.device.vision import DeviceVision
from adalink.runtime.device.workspace import ENGINE, VISION, Plans
from adalink.runtime.engine import PatchVisionGraph, VisionGraph
from adalink.runtime.errors import BackendError, ContractError, DeploymentError, IntegrityError
from adalink.runtime.implements import implements
from adalink.runtime.profile import Profile
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import map_file
from adalink.runtime.storage.stamp import Stamp, stamp_of
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.trt.api import Api, load_api
from adalink.runtime.trt.executor import TensorRtExecutor
from adalink.runtime.trt.jit_cache import JitCache
from adalink.runtime.trt.record import PLAN_FILE, VISION_FILE, EngineRecord, read_record


class TensorRtBackend:
    """See ``adalink.runtime.engine.Backend``.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
    """

    def __init__(self, name: str, cpu_vision: Callable[[Path, VisionBase], VisionGraph]) -> None:
        """Load the library.

        Args:
            name: ``tensorrt`` or ``tensorrt-rtx``.
            cpu_vision: opens the ONNX graph of a vision tower that has no plan, on the CPU.

        Raises:
            BackendUnavailableError: the package is missing.
        """
        self.name = name
        self._api = load_api(name)
        self._cpu_vision = cpu_vision

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> DeviceEngine:
        """See ``adalink.runtime.engine.Backend``; ``graph`` is a plan, with its record beside it.

        The caller has compared the plan with its digest: a plan is code.

        Raises:
            BackendError: the plan is of another version or for another GPU.
            BackendUnavailableError: there is no driver or no GPU.
        """
        record = self._read(graph)
        if role != "base" or base.kind == "encoder-decoder":
            raise ContractError(f"{graph}: {base.name} is an encoder-decoder, for which no engine is built")
        check_validity(self._api, graph)
        device = CudaDevice(self.name)
        return DeviceEngine(device, TensorRtPlans(self._api, device, graph.parent, record), base, table)

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> DeviceSharedAdapterGraph:
        """See ``adalink.runtime.engine.Backend``: the engine's embedders compute the adapters."""
        return DeviceSharedAdapterGraph(activation_key)

    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        """See ``adalink.runtime.engine.Backend``; the graph itself, where there is no plan, runs on the CPU."""
        if graph.suffix == ".onnx":
            return self._cpu_vision(graph, base)
        record = self._read(graph)
        check_validity(self._api, graph)
        device = CudaDevice(self.name)
        return DeviceVision(device, TensorRtPlans(self._api, device, graph.parent, record), base)

    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> PatchVisionGraph:
        """See ``adalink.runtime.engine.Backend``: no engine is built for a base whose images keep their shape."""
        raise BackendError(
            f"{graph}: images of {base.contract.name} keep their shape, which {self.name} does not run: "
            "use onnxruntime-cpu"
        )

    def _read(self, plan: Path) -> EngineRecord:
        record = read_record(plan.parent)
        check_record(record, self._api, plan.parent)
        return record


class TensorRtPlans:
    """See ``adalink.runtime.device.workspace.Plans``: each plan is deserialised at its first use, once.

    Attributes:
        profile: shapes that the engine takes.
        largest_rank: largest rank that the embedders take.
        largest_slots: most weight slots that the embedders take.
    """

    def __init__(self, api: Api, device: CudaDevice, folder: Path, record: EngineRecord) -> None:
        self.profile: Profile = record.profile
        self.largest_rank = record.embedder_rank
        self.largest_slots = record.embedder_slots
        self._api = api
        self._device = device
        self._runtime = api.make_runtime()
        self._folder = folder
        self._files = {ENGINE: PLAN_FILE, VISION: VISION_FILE, **record.embedders}
        # The caller has just verified them: they are loaded later, and must be these still.
        self._stamps = {name: _stamp(folder / file) for name, file in self._files.items()}
        self._engines: dict[str, Any] = {}
        self._caches: dict[str, JitCache] = {}

    @implements(Plans)
    def executor(self, name: str, profile: int, arena: DeviceArena) -> TensorRtExecutor:
        with self._device.not_recording:
            engine = self._engine(name)
            context = self._api.make_context(engine, self._caches[name].config)
            size = self._api.scratch_bytes(engine)
            if size:
                self._api.set_scratch(context, arena.scratch(name, size), size)
            origin = str(self._folder / self._files[name])
            return TensorRtExecutor(self._api, engine, context, profile, arena.queue, origin)

    def close(self) -> None:
        """See ``Plans``; saves the kernels compiled for this GPU."""
        for cache in self._caches.values():
            cache.save()
        self._caches.clear()
        self._engines.clear()

    def _engine(self, name: str) -> Any:
        if name not in self._engines:
            if name not in self._files:
                raise BackendError(f"{self._folder} has no embedder {name!r}: build the engine again with this kit")
            path = self._folder / self._files[name]
            self._api.clear()
            engine = self._runtime.deserialize_cuda_engine(memoryview(read_plan(path)))
            if _stamp(path) != self._stamps[name]:
                raise IntegrityError(f"{path} was changed after it was verified: open the deployment again")
            if engine is None:
                raise self._api.error(
                    f"{path}: cannot be loaded", "build it again for this GPU with 'adalink export engine'"
                )
            self._engines[name] = engine
            self._caches[name] = JitCache(self._api, engine, path)
        return self._engines[name]


def _stamp(path: Path) -> Stamp | None:
    """A plan's stamp; ``None`` if there is none."""
    try:
        return stamp_of(path.stat())
    except OSError:
        return None


def read_plan(path: Path) -> Any:
    """A plan's bytes, mapped; raises ``IntegrityError``."""
    try:
        return map_file(path).data
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; build the engine again") from error


def check_record(record: EngineRecord, api: Api, folder: Path) -> None:
    """Check that the engine of a record was built by this library; raises ``DeploymentError`` or ``BackendError``."""
    if record.backend != api.backend:
        raise DeploymentError(
            f"{folder}: this engine was built for {record.backend}, not for {api.backend}: open it with --backend "
            f"{record.backend}"
        )
    if record.version != api.version:
        raise BackendError(
            f"{folder}: this engine was built by {api.backend} {record.version}, installed is {api.version}: install "
            f"that version, or build it again with 'adalink export engine DIR --backend {api.backend} --replace'"
        )


def check_validity(api: Api, plan: Path) -> None:
    """Check whether the library would load a plan on this machine; raises ``BackendError`` with its reasons."""
    verdict = api.validity(read_plan(plan))
    # Without a driver the library cannot tell; the error that says so comes from CUDA itself.
    reasons = (
        [] if verdict is None or verdict[0] != "invalid" else [line for line in verdict[1] if line != "cuda error"]
    )
    if reasons:
        raise BackendError(
            f"{plan}: {api.backend} {api.version} refuses it on this machine: {', '.join(reasons)}; build it again "
            "here, or for this GPU with 'adalink export engine DIR --target'"
        )
