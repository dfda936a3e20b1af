"""A backend with hooks: callbacks before and after every forward pass of a decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adalink.runtime.arrays import Array
from adalink.runtime.engine import (
    Backend,
    DecodeState,
    Engine,
    EngineInput,
    KvPrefixEngine,
    SpeculativeDecodeState,
)
from adalink.runtime.implements import implements
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.tools.common.forwarding_backend import ForwardingBackend

Begin = Callable[[], object]
End = Callable[[Array], object]
RolledBack = Callable[[int], object]
Dropped = Callable[[int], object]


class ObservedBackend(ForwardingBackend):
    """A backend that reports each forward pass: the prompts, then each decode step or verification of draft tokens.

    Attributes:
        name: of the backend inside.
    """

    def __init__(
        self,
        inner: Backend,
        begin: Begin = lambda: None,
        end: End = lambda logits: None,
        rolled_back: RolledBack = lambda count: None,
        dropped: Dropped = lambda row: None,
    ) -> None:
        """Watch a backend.

        Args:
            inner: the backend.
            begin: called before a pass.
            end: called after it with logits of shape ``(rows, vocab)``, or for each of several tokens of the only row
                with ``(1, vocab)``; the next pass writes over them.
            rolled_back: called with the number of draft tokens that were rolled back.
            dropped: called with a row that was dropped; the last row takes its number.
        """
        super().__init__(inner)
        self._hooks = begin, end, rolled_back, dropped

    @implements(Backend)
    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        engine = self._inner.open_engine(graph, base, role, table)
        if isinstance(engine, KvPrefixEngine):
            return _ObservedKvPrefixEngine(engine, *self._hooks)
        return _ObservedEngine(engine, *self._hooks)


class _ObservedEngine:
    def __init__(self, inner: Engine, begin: Begin, end: End, rolled_back: RolledBack, dropped: Dropped) -> None:
        self._inner = inner
        self._begin = begin
        self._end = end
        self._rolled_back = rolled_back
        self._dropped = dropped
        self.embedder = inner.embedder
        self.profile = inner.profile
        self.padding_side = inner.padding_side
        self.run = inner.run
        self.close = inner.close

    def start(self, feeds: Mapping[str, EngineInput], max_new_tokens: int) -> DecodeState:
        self._begin()
        return self._observe(self._inner.start(feeds, max_new_tokens))

    def _observe(self, decoding: DecodeState) -> DecodeState:
        self._end(decoding.logits)
        if isinstance(decoding, SpeculativeDecodeState):
            return _ObservedSpeculativeDecodeState(decoding, self._begin, self._end, self._dropped, self._rolled_back)
        return _ObservedDecodeState(decoding, self._begin, self._end, self._dropped)


class _ObservedKvPrefixEngine(_ObservedEngine):
    def __init__(self, inner: Any, begin: Begin, end: End, rolled_back: RolledBack, dropped: Dropped) -> None:
        super().__init__(inner, begin, end, rolled_back, dropped)
        self._after: KvPrefixEngine = inner
        self.run_after = inner.run_after
        self.read_states = inner.read_states

    def start_after(
        self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, EngineInput], max_new_tokens: int
    ) -> DecodeState:
        self._begin()
        return self._observe(self._after.start_after(kv_prefixes, feeds, max_new_tokens))


class _ObservedDecodeState:
    def __init__(self, inner: DecodeState, begin: Begin, end: End, dropped: Dropped) -> None:
        self._inner = inner
        self._begin = begin
        self._end = end
        self._dropped = dropped
        self.close = inner.close

    @property
    def logits(self) -> Array:
        return self._inner.logits

    def step(self, inputs_embeds: EngineInput) -> None:
        self._begin()
        self._inner.step(inputs_embeds)
        self._end(self._inner.logits)

    def drop(self, row: int) -> None:
        self._inner.drop(row)
        self._dropped(row)


class _ObservedSpeculativeDecodeState(_ObservedDecodeState):
    def __init__(
        self, inner: SpeculativeDecodeState, begin: Begin, end: End, dropped: Dropped, rolled_back: RolledBack
    ) -> None:
        super().__init__(inner, begin, end, dropped)
        self._inner_state = inner
        self._rolled_back = rolled_back

    def verify(self, inputs_embeds: EngineInput) -> Array:
        self._begin()
        logits = self._inner_state.verify(inputs_embeds)
        for row in range(len(logits)):
            self._end(logits[row : row + 1])
        return logits

    def rollback(self, count: int) -> None:
        self._inner_state.rollback(count)
        self._rolled_back(count)
