"""The embedding table in a file of its own: written block by block, also out of the data of a graph that goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.embedding_table import TENSOR_NAME, EmbeddingTable, open_table, stored_row
from adalink.runtime.storage.integrity import locate, verify_files
from adalink.runtime.storage.manifest import Base, Manifest
from adalink.runtime.storage.safetensors import STORED, aligned_header, as_float32, as_stored
from adalink.runtime.storage.table_schema import CODES, HALVES, TableStorage

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}
_BLOCK_ROWS = 4096

# From a range of token ids to their rows.
Rows = Callable[[int, int], Array]


def blocks_of_rows(count: int, rows: int = _BLOCK_ROWS) -> Iterator[tuple[int, int]]:
    """First id and the one behind the last of each block of ``rows``, of a table of ``count`` rows."""
    return ((first, min(first + rows, count)) for first in range(0, count, rows))


def write_rows(path: Path, base: Base, stored: Rows) -> None:
    """Write a table in a safetensors file.

    Args:
        path: file to write, new.
        base: the base contract, with the table's ``table``.
        stored: rows as they are stored.
    """
    dtype, width = stored_row(base, base.table)
    size = base.vocab_size * width * np.dtype(STORED.get(dtype, "u1")).itemsize
    entry = {"dtype": _SAFETENSORS[dtype], "shape": [base.vocab_size, width], "data_offsets": [0, size]}
    with path.open("wb") as file:
        file.write(aligned_header(json.dumps({TENSOR_NAME: entry}).encode()))
        for ids in blocks_of_rows(base.vocab_size):
            file.write(np.ascontiguousarray(stored(*ids)).data)


def takes_table_along(before: Manifest, after: Manifest) -> bool:
    """Whether the table lies in the data of a variant, and no variant has that file after a change."""

    def is_in_variant(manifest: Manifest) -> bool:
        return any(before.base.embeddings in variant.files for variant in manifest.variants.values())

    return after.base.embeddings == before.base.embeddings and is_in_variant(before) and not is_in_variant(after)


def own_name(base: Base) -> str:
    """Name of the file that a table in a graph's data is written out to; codes keep the form that they have there."""
    return "embeddings.data" if base.table is not None and base.table.head is not None else "embeddings.safetensors"


def write_out(folder: Path, manifest: Manifest, relative: str, path: Path) -> Base:
    """Write a table that lies in a graph's data into a file of its own.

    Args:
        folder: the deployment.
        manifest: its manifest.
        relative: the file's path in the deployment.
        path: the file, new.

    Returns:
        The base with its table there; every row is what it was, bit for bit.

    Raises:
        IntegrityError: the data are missing or altered, or what was written is not read back.
    """
    base = manifest.base
    verify_files(folder, manifest, [base.embeddings])
    table = open_table(locate(folder, base.embeddings), base)
    moved = msgspec.structs.replace(base, embeddings=relative, table=_own_storage(table, base))
    if moved.table is not None and moved.table.head is not None:
        with path.open("wb") as file:
            for part in table.parts:
                file.write(np.ascontiguousarray(part).data)
    else:
        encoding = stored_row(moved, moved.table)[0]
        write_rows(path, moved, lambda first, last: as_stored(table.stored_block(first, last), encoding))
    copy = open_table(path, moved)
    if any(copy.block(*ids).tobytes() != table.block(*ids).tobytes() for ids in blocks_of_rows(len(table))):
        raise IntegrityError(
            f"{path} was written with other rows than {base.embeddings} has: the disk or the memory of this machine "
            "altered it; try again"
        )
    return moved


def _own_storage(table: EmbeddingTable, base: Base) -> TableStorage | None:
    """How a table that lies in a graph's data is stored in a file of its own: codes as they are, rows in 16 bits."""
    storage = base.table
    assert storage is not None
    if storage.head is not None:
        codes = table.parts[0]
        head = msgspec.structs.replace(storage.head, codes_start=0, scales_start=codes.nbytes)
        return TableStorage(encoding=CODES, scale=storage.scale, head=head)
    halves = (half for half in HALVES if storage.encoding == "float32" and _fits(table, half))
    encoding = next(halves, storage.encoding)
    if encoding == base.embedding_dtype and storage.scale == 1:
        return None
    return TableStorage(encoding=encoding, scale=storage.scale)


def _fits(table: EmbeddingTable, encoding: str) -> bool:
    """Whether 16 bits hold every number of a table."""
    blocks = (table.stored_block(*ids) for ids in blocks_of_rows(len(table)))
    with np.errstate(over="ignore"):
        return all(as_float32(as_stored(block, encoding)).tobytes() == block.tobytes() for block in blocks)
