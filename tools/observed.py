"""A backend whose decodings are watched from outside: when a pass begins, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from adalink.runtime.engine import Array, Backend, BankGraph, Decoding, Engine, Fed, VisionGraph
from adalink.runtime.manifest import Base
from adalink.runtime.onnxruntime_patches import OnnxPatchGraph

Begin = Callable[[], object]
End = Callable[[Array], object]


class ObservedBackend:
    """Another backend that tells of each pass of a decoding: of its prompts, then of each step.

    Attributes:
        name: of the backend inside.
    """

    def __init__(self, inner: Backend, begin: Begin = lambda: None, end: End = lambda logits: None) -> None:
        """``begin`` is called before a pass, ``end`` after it with logits that the next pass writes over."""
        self.name = inner.name
        self._inner = inner
        self._begin = begin
        self._end = end

    def open_engine(self, graph: Path, base: Base, role: str, table: Array) -> Engine:
        """See ``adalink.runtime.engine.Backend``."""
        return _ObservedEngine(self._inner.open_engine(graph, base, role, table), self._begin, self._end)

    def open_bank(self, kind: str, graph: bytes, base: Base) -> BankGraph:
        """See ``adalink.runtime.engine.Backend``."""
        return self._inner.open_bank(kind, graph, base)

    def open_vision(self, graph: Path, base: Base) -> VisionGraph | OnnxPatchGraph:
        """See ``adalink.runtime.engine.Backend``."""
        return self._inner.open_vision(graph, base)


class _ObservedEngine:
    def __init__(self, inner: Engine, begin: Begin, end: End) -> None:
        self._inner = inner
        self._begin = begin
        self._end = end
        self.front = inner.front
        self.profile = inner.profile
        self.run = inner.run
        self.close = inner.close

    def start(self, feeds: Mapping[str, Fed], room: int) -> Decoding:
        self._begin()
        decoding = self._inner.start(feeds, room)
        self._end(decoding.logits)
        return _ObservedDecoding(decoding, self._begin, self._end)


class _ObservedDecoding:
    def __init__(self, inner: Decoding, begin: Begin, end: End) -> None:
        self._inner = inner
        self._begin = begin
        self._end = end
        self.drop = inner.drop
        self.close = inner.close

    @property
    def logits(self) -> Array:
        return self._inner.logits

    def step(self, inputs_embeds: Fed) -> None:
        self._begin()
        self._inner.step(inputs_embeds)
        self._end(self._inner.logits)
