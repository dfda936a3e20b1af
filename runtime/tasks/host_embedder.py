"""Host embedder: adapters are applied in main memory, for engines that take arrays."""

from __future__ import annotations

from adalink.runtime.arrays import Array
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


class HostEmbedder:
    """See ``adalink.runtime.engine.InputEmbedder``; results are arrays."""

    def __init__(self, table: Array) -> None:
        self._table = table

    def lookup(self, ids: Array, tasks: AdapterMapping, modality: Array | None = None) -> Array:
        """See ``adalink.runtime.engine.InputEmbedder``."""
        return tasks.lookup(self._table, ids, modality)

    def apply(self, embeds: Array, tasks: AdapterMapping, modality: Array | None = None) -> Array:
        """See ``adalink.runtime.engine.InputEmbedder``."""
        return tasks.apply(embeds, modality)

    def for_decoding(self, tasks: AdapterMapping) -> AdapterMapping:
        """See ``adalink.runtime.engine.InputEmbedder``."""
        return tasks.for_decoding()

    def read(self, engine_input: Array) -> Array:
        """See ``adalink.runtime.engine.InputEmbedder``."""
        return engine_input
