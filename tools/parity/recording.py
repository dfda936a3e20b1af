"""A backend that keeps what its engines return, so that every decode step can be compared and not only its token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adalink.runtime.engine import Array, Backend, BankGraph, Engine
from adalink.runtime.manifest import Base


class RecordingBackend:
    """Another backend, with the last position of every engine output kept.

    Attributes:
        name: of the backend inside.
        steps: outputs since the last ``clear``, one array with shape ``(batch, vocab)`` or ``(batch, d)`` each.
    """

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self.steps: list[Array] = []
        self._inner = inner

    def open_engine(self, graph: Path, base: Base, role: str) -> Engine:
        """See ``adalink.runtime.engine.Backend``; an encoder-decoder's encoder is not recorded."""
        engine = self._inner.open_engine(graph, base, role)
        is_recorded = role == "decoder" or base.kind == "decoder"
        return RecordingEngine(engine, self.steps) if is_recorded else engine

    def open_bank(self, graph: bytes, base: Base) -> BankGraph:
        """See ``adalink.runtime.engine.Backend``."""
        return self._inner.open_bank(graph, base)


class RecordingEngine:
    """An engine whose outputs are copied to a list."""

    def __init__(self, inner: Engine, steps: list[Array]) -> None:
        self._inner = inner
        self._steps = steps

    @property
    def inputs(self) -> frozenset[str]:
        """See ``adalink.runtime.engine.Engine``."""
        return self._inner.inputs

    def run(self, feeds: Mapping[str, Array], cache: object | None = None) -> tuple[Array, object | None]:
        """See ``adalink.runtime.engine.Engine``."""
        output, cache = self._inner.run(feeds, cache)
        self._steps.append(output[:, -1].copy())
        return output, cache

    def close(self) -> None:
        """See ``adalink.runtime.engine.Engine``."""
        self._inner.close()
