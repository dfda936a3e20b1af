"""Storage of the embedding table, where it is smaller than its rows: the section ``$.base.table`` of a manifest."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES

HALVES = ("bfloat16", "float16")
ENCODINGS = (*HALVES, *BLOCK_TYPES)

Demand = Callable[[bool, str, object, str], None]


class TableStorage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a row of the table is stored; looked up it is ``float32(stored) * scale``, in the base's dtype.

    Attributes:
        encoding: ``"float16"``, ``"bfloat16"`` or a GGUF block type such as ``"Q8_0"``.
        scale: factor of the embedding module, a float32 number; 1 for most models.
    """

    encoding: str
    scale: float = 1.0


def check_table_storage(storage: TableStorage, hidden_size: int, demand: Demand) -> None:
    """Validate the section of a manifest.

    Args:
        storage: the section.
        hidden_size: width of the embeddings.
        demand: called with whether something holds, its field, what was received and what was expected.
    """
    encoding, scale = storage.encoding, storage.scale
    demand(encoding in ENCODINGS, "$.base.table.encoding", encoding, f"one of {', '.join(ENCODINGS)}")
    if encoding in BLOCK_TYPES:
        weights = BLOCK_TYPES[encoding].weights
        what = f"{encoding}, of blocks of {weights} weights, for a hidden_size of {hidden_size}"
        demand(hidden_size % weights == 0, "$.base.table.encoding", what, "blocks that fill a row")
    demand(math.isfinite(scale) and scale != 0, "$.base.table.scale", scale, "a finite number other than 0")
