"""Host embedder: adapters are applied in main memory, for engines that take arrays."""

from __future__ import annotations

from adalink.runtime.arrays import Array
from adalink.runtime.engine import InputEmbedder
from adalink.runtime.implements import implements
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


class HostEmbedder:
    """See ``adalink.runtime.engine.InputEmbedder``; results are arrays."""

    def __init__(self, table: EmbeddingTable) -> None:
        self._table = table

    @implements(InputEmbedder)
    def lookup(self, ids: Array, tasks: AdapterMapping, modality: Array | None = None) -> Array:
        return tasks.lookup(self._table, ids, modality)

    @implements(InputEmbedder)
    def apply(self, embeds: Array, tasks: AdapterMapping, modality: Array | None = None) -> Array:
        return tasks.apply(embeds, modality)

    @implements(InputEmbedder)
    def for_decoding(self, tasks: AdapterMapping) -> AdapterMapping:
        return tasks.for_decoding()

    @implements(InputEmbedder)
    def read(self, engine_input: Array) -> Array:
        return engine_input
