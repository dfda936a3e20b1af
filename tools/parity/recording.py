"""A backend that keeps what its engines return, so that every decode step can be compared and not only its token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from adalink.runtime.engine import Array, Backend, BankGraph, Decoding, Engine
from adalink.runtime.manifest import Base


class RecordingBackend:
    """Another backend, with the logits of every decode step kept.

    Attributes:
        name: of the backend inside.
        steps: logits since the last ``clear``, one array with shape ``(rows, vocab)`` each.
    """

    def __init__(self, inner: Backend) -> None:
        self.name = inner.name
        self.steps: list[Array] = []
        self._inner = inner

    def open_engine(self, graph: Path, base: Base, role: str) -> Engine:
        """See ``adalink.runtime.engine.Backend``."""
        return RecordingEngine(self._inner.open_engine(graph, base, role), self.steps)

    def open_bank(self, graph: bytes, base: Base) -> BankGraph:
        """See ``adalink.runtime.engine.Backend``."""
        return self._inner.open_bank(graph, base)


class RecordingEngine:
    """An engine whose decodings are copied to a list, step by step."""

    def __init__(self, inner: Engine, steps: list[Array]) -> None:
        self._steps = steps
        self._inner = inner
        self.run = inner.run
        self.resumes = inner.resumes
        self.close = inner.close

    def start(self, feeds: Mapping[str, Array], room: int, known: Sequence[Array | None] = ()) -> Decoding:
        """See ``adalink.runtime.engine.Engine``."""
        return RecordingDecoding(self._inner.start(feeds, room, known), self._steps)


class RecordingDecoding:
    """A decoding whose logits are copied to a list."""

    def __init__(self, inner: Decoding, steps: list[Array]) -> None:
        self._inner = inner
        self._steps = steps
        self.drop = inner.drop
        self.states = inner.states
        steps.append(inner.logits.copy())

    @property
    def logits(self) -> Array:
        """See ``adalink.runtime.engine.Decoding``."""
        return self._inner.logits

    def step(self, inputs_embeds: Array) -> None:
        """See ``adalink.runtime.engine.Decoding``."""
        self._inner.step(inputs_embeds)
        self._steps.append(self._inner.logits.copy())
