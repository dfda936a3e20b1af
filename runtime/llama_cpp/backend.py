"""llama.cpp backend: the engine of a variant is a GGUF file; adapters run beside it on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from adalink.runtime.engine import Backend, Engine, PatchVisionGraph, SharedAdapterGraph, VisionGraph
from adalink.runtime.errors import BackendError, GraphError
from adalink.runtime.implements import implements
from adalink.runtime.llama_cpp.context import LlamaModel
from adalink.runtime.llama_cpp.engine import LlamaEngine
from adalink.runtime.llama_cpp.input_scale import find_input_scale
from adalink.runtime.llama_cpp.library import open_library
from adalink.runtime.llama_cpp.sequences import Sequences
from adalink.runtime.llama_cpp.structures import F16, F32
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.tasks.host_embedder import HostEmbedder

OpenBank = Callable[[str, bytes, Base], SharedAdapterGraph]


class LlamaCppBackend:
    """See ``adalink.runtime.engine.Backend``.

    Attributes:
        name: ``llama.cpp``.
    """

    def __init__(self, name: str, threads: int | None, gpu_layers: int, open_bank: OpenBank) -> None:
        """Load the library.

        Args:
            name: ``llama.cpp``.
            threads: threads of the engine; all cores by default.
            gpu_layers: layers whose weights go to a GPU.
            open_bank: opens shared adapter graphs.

        Raises:
            BackendUnavailableError: the package is missing, or another one than the kit knows.
        """
        open_library()
        self.name = name
        self._threads, self._gpu_layers, self._open_bank = threads or _cores(), gpu_layers, open_bank

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        """See ``adalink.runtime.engine.Backend``; ``graph`` is a GGUF file."""
        if base.embedding_dtype != "float32":
            raise BackendError(
                f"llama.cpp takes embeddings in float32, and those of {base.name} are {base.embedding_dtype}: export "
                "the base with --dtype fp32"
            )
        model = LlamaModel(graph, self._gpu_layers)
        sequences = Sequences(model, self._threads, F32 if model.is_float32 else F16, base.max_positions)
        try:
            for what, received, expected in (
                ("logits", model.vocab_size, base.vocab_size),
                ("numbers of an embedding", model.width, base.hidden_size),
            ):
                if received != expected:
                    raise GraphError(f"{graph}: {received} {what}, the contract says {expected}: export it again")
            scale = find_input_scale(sequences, table, str(graph))
        except BaseException:
            sequences.close()
            raise
        return LlamaEngine(model, sequences, HostEmbedder(table), scale)

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> SharedAdapterGraph:
        """See ``adalink.runtime.engine.Backend``: adapters are not llama.cpp's."""
        return self._open_bank(activation_key, graph, base)

    @implements(Backend)
    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        raise _no_images(base)

    @implements(Backend)
    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> PatchVisionGraph:
        raise _no_images(base)


def _no_images(base: VisionBase) -> BackendError:
    return BackendError(f"images of {base.contract.name} do not go to llama.cpp: use onnxruntime-cpu")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
