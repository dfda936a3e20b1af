"""Storage of the embedding table, where it is smaller than its rows: the section ``$.base.table`` of a manifest."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES

HALVES = ("bfloat16", "float16")
NUMBERS = ("float32", *HALVES)
CODES = "codes"
ENCODINGS = (*NUMBERS, *BLOCK_TYPES, CODES)

Demand = Callable[[bool, str, object, str], None]


class HeadCodes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Place of the 8 bit codes of a tied head in the external data of a graph; a weight is ``(code - 128) * scale``.

    Attributes:
        codes_start: first byte of the codes, uint8 ``(vocab, d)``.
        scales_start: first byte of their scales, float32 ``(vocab, d / block_size)``.
        block_size: weights of a scale.
    """

    codes_start: int
    scales_start: int
    block_size: int


class TableStorage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a row of the table is stored; looked up it is ``float32(stored) * scale``, in the base's dtype.

    Attributes:
        encoding: ``"float32"``, ``"float16"``, ``"bfloat16"``, a GGUF block type such as ``"Q8_0"``, or ``"codes"`` of
            a tied head.
        scale: factor of the embedding module, a float32 number; 1 for most models.
        head: place of codes; ``None`` for other encodings.
        rows_start: first byte of the rows of a tied head, ``(vocab, d)``, in the external data of a graph; ``None`` for
            other tables.
    """

    encoding: str
    scale: float = 1.0
    head: HeadCodes | None = None
    rows_start: int | None = None


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
    head = storage.head
    demand((encoding == CODES) == (head is not None), "$.base.table.head", head, "a place for codes, and only for them")
    if head is not None:
        for name in ("codes_start", "scales_start"):
            start = getattr(head, name)
            demand(0 <= start < 1 << 62, f"$.base.table.head.{name}", start, "the number of a byte")
        fits = 1 <= head.block_size <= hidden_size and hidden_size % head.block_size == 0
        demand(fits, "$.base.table.head.block_size", head.block_size, f"a divisor of {hidden_size}")
    rows_start, field = storage.rows_start, "$.base.table.rows_start"
    demand(rows_start is None or encoding in NUMBERS, field, rows_start, f"null for the encoding {encoding}")
    demand(rows_start is None or 0 <= rows_start < 1 << 62, field, rows_start, "the number of a byte")
    demand(math.isfinite(scale) and scale != 0, "$.base.table.scale", scale, "a finite number other than 0")
