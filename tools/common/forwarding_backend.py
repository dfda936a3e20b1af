"""A backend around another one, for wrappers that change how engines are opened."""

from __future__ import annotations

from pathlib import Path

from adalink.runtime.engine import Backend, PatchVisionGraph, SharedAdapterGraph, VisionGraph
from adalink.runtime.implements import implements
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import PatchTower


class ForwardingBackend:
    """Opens shared adapter graphs and vision towers with the backend inside; a subclass opens engines.

    Attributes:
        name: of the backend inside.
    """

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self._inner = inner

    @implements(Backend)
    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> SharedAdapterGraph:
        return self._inner.open_bank(activation_key, graph, base)

    @implements(Backend)
    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        return self._inner.open_vision(graph, base)

    @implements(Backend)
    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> PatchVisionGraph:
        return self._inner.open_patch_vision(graph, base, patches)
