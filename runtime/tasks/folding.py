"""Folding: a text task precomputed for every token, since on text an adapter is a function of the token alone.

A ``table`` fold holds the adapted embeddings: one lookup for a token. A ``rank`` fold holds ``act(down(x))`` of every
token: one lookup and one product of width ``r``; older kits exported it. Both agree with the graph within its bound
(docs/concepts/parity.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.implements import implements
from adalink.runtime.storage.adapter import TABLE_NAME, Adapter
from adalink.runtime.storage.adapter_spec import rank_of
from adalink.runtime.storage.embedding_table import EmbeddingTable, view_table
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import Bytes
from adalink.runtime.storage.safetensors import raw_tensors

HIDDEN_NAME = "hidden"


class Folded(Protocol):
    """A folded task: it needs token ids and no graph."""

    def lookup(self, table: EmbeddingTable, ids: Array) -> Array:
        """Adapted embeddings with shape ``(batch, seq, d)``.

        Args:
            table: the base's embedding table.
            ids: token ids with shape ``(batch, seq)``.
        """
        ...


@dataclass(frozen=True, eq=False)
class TableFold:
    """All adapted embeddings, with shape ``(vocab, d)``, in the base's dtype."""

    adapted: Array

    @implements(Folded)
    def lookup(self, table: EmbeddingTable, ids: Array) -> Array:
        return self.adapted.take(ids, axis=0)


@dataclass(frozen=True, eq=False)
class RankFold:
    """Activations of every token, float32 with shape ``(vocab, r)``; ``up`` has shape ``(d, r)``."""

    hidden: Array
    up: Array
    up_bias: Array | None

    @implements(Folded)
    def lookup(self, table: EmbeddingTable, ids: Array) -> Array:
        delta: Array = np.matmul(self.hidden.take(ids, axis=0), self.up.T)
        if self.up_bias is not None:
            delta += self.up_bias
        embeds = table.take(ids)
        if embeds.dtype == delta.dtype:
            delta += embeds
            return delta
        result: Array = (delta + embeds).astype(embeds.dtype)
        return result


def ids_table(adapter: Adapter) -> RankFold:
    """The table of an adapter with ``input`` ``"ids"``: a rank fold that was trained directly."""
    return RankFold(adapter.weights[TABLE_NAME], adapter.weights["text.up.weight"], None)


def view_fold(kind: str, data: Bytes, adapter: Adapter, base: Base) -> Folded:
    """The fold in a file's bytes; raises ``ValueError`` if it does not fit adapter and base."""
    if kind == "table":
        return TableFold(view_table(data, base))
    tensors, shape = raw_tensors(data), (base.vocab_size, rank_of(adapter.config.rank, "text"))
    hidden = tensors.get(HIDDEN_NAME)
    if len(tensors) != 1 or hidden is None or hidden.shape != shape or hidden.dtype != np.float32:
        contents = [f"{name} of {tensor.dtype} with shape {tensor.shape}" for name, tensor in tensors.items()]
        raise ValueError(
            f"expected one tensor {HIDDEN_NAME!r} of float32 with shape {shape}; it holds {', '.join(contents)}"
        )
    return RankFold(hidden, adapter.weights["text.up.weight"], adapter.weights.get("text.up.bias"))
