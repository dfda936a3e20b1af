"""ONNX Runtime backend on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.engine import Backend, Engine
from adalink.runtime.errors import BackendError, BackendUnavailableError, RequestError
from adalink.runtime.implements import implements
from adalink.runtime.ort.dynamic_cache import DynamicCacheEngine
from adalink.runtime.ort.open_session import open_session
from adalink.runtime.ort.patch_vision import OnnxPatchGraph
from adalink.runtime.ort.session import GuardedSession, check_version, read_signature
from adalink.runtime.ort.shared_adapter_graph import OnnxSharedAdapterGraph
from adalink.runtime.ort.static_cache import StaticCacheEngine
from adalink.runtime.ort.vision import OnnxVisionGraph
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.tasks.host_embedder import HostEmbedder

if TYPE_CHECKING:
    import onnxruntime as ort

_PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider"}


class OnnxRuntimeBackend:
    """ONNX Runtime with one execution provider.

    Attributes:
        name: ``onnxruntime-cpu``.
    """

    def __init__(self, name: str, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend {name} needs ONNX Runtime, which is not installed: pip install 'adalink-kit[cpu]'"
            ) from error
        if threads is not None and threads < 1:
            raise RequestError(f"threads is {threads}, expected at least 1")
        self.name = name
        self._ort = onnxruntime
        self._threads = threads

    @implements(Backend)
    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        if base.embedding_dtype == "bfloat16":
            raise BackendError(
                "onnxruntime-cpu has no bfloat16 kernels: export the base again with --dtype fp32 or fp16, "
                "or use this deployment with TensorRT"
            )
        session = self._session(str(graph), self._threads or 0, origin=str(graph))
        check_version(session, self._ort.__version__, origin=str(graph))
        guarded = GuardedSession(session, self._ort, origin=str(graph))
        signature = read_signature(session, base, role, origin=str(graph))
        embedder = HostEmbedder(table)
        if signature.in_place:
            return StaticCacheEngine(guarded, signature, embedder)
        return DynamicCacheEngine(guarded, signature, embedder, "right" if base.kind == "encoder" else "left")

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> OnnxSharedAdapterGraph:
        """See ``adalink.runtime.engine.Backend``. The graph is tiny: one thread, no thread pool."""
        return OnnxSharedAdapterGraph(self._session(graph, 1, origin="shared adapter graph"), self._ort, base)

    @implements(Backend)
    def open_vision(self, graph: Path, base: VisionBase) -> OnnxVisionGraph:
        return OnnxVisionGraph(graph, base, self._threads)

    @implements(Backend)
    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> OnnxPatchGraph:
        return OnnxPatchGraph(graph, base, patches, self._threads)

    def _session(self, model: str | bytes, threads: int, origin: str) -> ort.InferenceSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        provider = _PROVIDERS[self.name]
        return open_session(self._ort, origin, model, options, [provider])
