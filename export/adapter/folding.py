"""Folding: a text task precomputed for every token, checked over the whole vocabulary, written as one tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from adalink.export.adapter.check import find_outside_bound
from adalink.export.adapter.error_bound import Float64
from adalink.export.adapter.session import OpenGraph
from adalink.export.table_file import blocks_of_rows
from adalink.runtime.arrays import Array
from adalink.runtime.errors import ConfigError, GraphError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.embedding_table import TENSOR_NAME, EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import Bytes
from adalink.runtime.storage.safetensors import aligned_header, as_float32
from adalink.runtime.tasks.adapter_mapping import bank_weights
from adalink.runtime.tasks.folding import view_fold

# What can be written. Older kits wrote "rank" too (`adalink.runtime.tasks.folding`).
FOLD_FILES = {"table": "embeddings.safetensors"}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def check_foldable(fold: str, adapter: Adapter, origin: str) -> None:
    """Check that the adapter depends on the token alone, so that it can be precomputed; raises ``ConfigError``."""
    if fold not in FOLD_FILES:
        raise ConfigError(
            f"fold is {fold!r}, expected {' or '.join(FOLD_FILES)}; the bottleneck of every token, once 'rank', is "
            "what 'adalink export lora' writes for other engines"
        )
    if adapter.config.modalities != ("text",):
        raise ConfigError(
            f"{origin} adapts {', '.join(adapter.config.modalities)}: only an adapter of text alone can be folded, "
            "whose inputs are the rows of the embedding table; export it without --fold"
        )
    if adapter.config.input == "ids" or not adapter.config.rank:
        what = "looks token ids up" if adapter.config.rank else "has no bottleneck"
        raise ConfigError(f"{origin} {what}: there is nothing to compute ahead; export it without --fold")


def fold_task(fold: str, adapter: Adapter, base: Base, table: EmbeddingTable, bank: OpenGraph) -> bytearray:
    """Bytes of a folded task; filled in place, since they are as large as the embedding table.

    Args:
        fold: a key of ``FOLD_FILES``.
        adapter: the task's adapter.
        base: the base contract.
        table: its embedding table.
        bank: the bank graph of the adapter's activation key, which computes a table.

    Raises:
        GraphError: a component of some token is outside the bound of the graph.
    """
    dtype = np.dtype(ml_dtypes.bfloat16 if base.embedding_dtype == "bfloat16" else base.embedding_dtype)
    weights = bank_weights(adapter, "text")
    data, rows = _tensor_file(TENSOR_NAME, _CODES[base.embedding_dtype], dtype, len(table), table.shape[1])
    for start, block in _blocks(table):
        rows[start : start + len(block)] = bank.run(block[None], weights)[0].astype(dtype)
    check_fold(fold, np.frombuffer(data, np.uint8), adapter, base, table)
    return data


def check_fold(fold: str, data: Bytes, adapter: Adapter, base: Base, table: EmbeddingTable) -> None:
    """Compare a folded form with the method in float64 for every token; raises ``GraphError``."""
    folded = view_fold(fold, data, adapter, base)
    for start, block in _blocks(table):
        received = _float64(folded.lookup(table, np.arange(start, start + len(block))))
        if outside := find_outside_bound(received, adapter, "text", block, base.embedding_dtype):
            raise GraphError(
                f"folded task ({fold}): component {outside.column} of token {start + outside.row} is "
                f"{outside.difference}: the task was not registered; report this with the versions of onnx, "
                "onnxruntime and numpy"
            )


def _blocks(table: EmbeddingTable) -> Iterator[tuple[int, Float64]]:
    return ((first, _float64(table.block(first, last))) for first, last in blocks_of_rows(len(table)))


def _float64(values: Array) -> Float64:
    return as_float32(values).astype(np.float64)


def _tensor_file(name: str, code: str, dtype: np.dtype[Any], *shape: int) -> tuple[bytearray, Array]:
    """A safetensors file with one tensor, aligned to 64 bytes, and a view of that tensor to fill."""
    size = dtype.itemsize * math.prod(shape)
    header = aligned_header(json.dumps({name: {"dtype": code, "shape": shape, "data_offsets": [0, size]}}).encode())
    data = bytearray(len(header) + size)
    data[: len(header)] = header
    return data, np.frombuffer(data, dtype, offset=len(header)).reshape(shape)
