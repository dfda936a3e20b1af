"""One engine for each graph, however many deployments run it: a parity run needs several, and memory for one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from adalink.runtime.engine import Backend, Engine
from adalink.runtime.implements import implements
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.tools.common.forwarding_backend import ForwardingBackend


class SharedEngines(ForwardingBackend):
    """A backend that opens each graph once. Deployments do not close its engines; ``close`` does.

    Attributes:
        name: of the backend inside.
        inner: the backend inside, which opens an engine at each call.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.inner = inner
        self._opened: dict[Path, Engine] = {}

    @implements(Backend)
    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        if graph not in self._opened:
            self._opened[graph] = self._inner.open_engine(graph, base, role, table)
        shared: Any = copy.copy(self._opened[graph])
        shared.close = lambda: None
        return shared  # type: ignore[no-any-return]

    def close(self) -> None:
        """Free the engines' memory."""
        for engine in self._opened.values():
            engine.close()
        self._opened.clear()

    def __enter__(self) -> SharedEngines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
