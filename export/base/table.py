"""The embedding table of a base, in the smallest storage that keeps every number, written block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from adalink.export.table_file import Rows, blocks_of_rows, write_rows
from adalink.export.writer import DeploymentWriter
from adalink.runtime.arrays import Array
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.digest import fingerprint_rows
from adalink.runtime.storage.embedding_table import EmbeddingTable, open_table, stored_row
from adalink.runtime.storage.gguf_blocks import BLOCK_TYPES
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import map_file
from adalink.runtime.storage.table_schema import HALVES, TableStorage
from adalink.training.models.gguf.header import read_header
from adalink.training.models.loading import embedding_matrix, input_embedding

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_GGUF_NAME = "token_embd.weight"


def write_table(
    writer: DeploymentWriter, base: Base, model: PreTrainedModel, gguf: Path | None, progress: Callable[[str], None]
) -> Base:
    """Write the table of a base.

    Args:
        writer: of the deployment.
        base: the base contract.
        model: the exported model, in the base's dtype.
        gguf: the GGUF file that it was loaded from, if it was.
        progress: callback, called with one line that says how the table is stored.

    Returns:
        The base with its ``table``.

    Raises:
        GraphError: what was written has another fingerprint than the checkpoint.
        OSError: the disk is full or read-only.
    """
    storage, rows, line = _choose(base, model, gguf)
    progress(f"writing the embedding table in {line}")
    base = msgspec.structs.replace(base, table=storage)
    path = writer.stage(base.embeddings)
    write_rows(path, base, rows)
    if storage is not None:
        _check_fingerprint(open_table(path, base), base)
    return base


def _choose(base: Base, model: PreTrainedModel, gguf: Path | None) -> tuple[TableStorage | None, Rows, str]:
    """The smallest storage that keeps every number, its rows, and a line that says why."""
    embeddings, tried = module_rows(model), []
    for storage, stored in _candidates(base, model, gguf):
        if keeps_every_number(base, partial(_look_up, base, storage, stored), embeddings):
            return storage, stored, storage.encoding
        tried.append(storage.encoding)
    reason = f": {' and '.join(tried)} would round it" if tried else ""
    return None, embeddings, f"{base.embedding_dtype}{reason}"


def _look_up(base: Base, storage: TableStorage, stored: Rows, first: int, last: int) -> Array:
    """Embeddings as they would be looked up in a storage."""
    return EmbeddingTable(stored(first, last), base.embedding_dtype, storage).block(0, last - first)


def keeps_every_number(base: Base, looked_up: Rows, embeddings: Rows) -> bool:
    """Whether rows that are looked up are the module's own for every token, bit for bit."""
    with np.errstate(over="ignore"):
        return all(looked_up(*ids).tobytes() == embeddings(*ids).tobytes() for ids in blocks_of_rows(base.vocab_size))


def _check_fingerprint(table: EmbeddingTable, base: Base) -> None:
    """Check that the stored rows are the checkpoint's embedding matrix; raises ``GraphError``."""
    fingerprint = fingerprint_rows(table.shape, (table.stored_block(*ids) for ids in blocks_of_rows(len(table))))
    if fingerprint != base.fingerprint:
        raise GraphError(
            f"the embedding table of {base.name} was written with fingerprint {fingerprint}, the checkpoint has "
            f"{base.fingerprint}: the disk or the memory of this machine altered it; export the base again"
        )


def _candidates(base: Base, model: PreTrainedModel, gguf: Path | None) -> Iterator[tuple[TableStorage, Rows]]:
    """Storages to try, the smallest first, each with the rows that it would hold."""
    import torch

    weight, scale = embedding_matrix(model), module_scale(model)
    if gguf is not None:
        place = read_header(gguf).tensors[_GGUF_NAME]
        encoding = next((name for name, blocks in BLOCK_TYPES.items() if blocks.kind == place.kind), None)
        if encoding is not None and place.shape == tuple(weight.shape):
            storage = TableStorage(encoding=encoding, scale=scale)
            yield storage, _file_rows(gguf, place.start, stored_row(base, storage)[1])
    if base.embedding_dtype == "float32":
        for encoding in HALVES:
            narrow = partial(_narrow, weight, getattr(torch, encoding))
            yield TableStorage(encoding=encoding, scale=scale), _tensor_rows(narrow)


def _narrow(weight: torch.Tensor, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    return weight[ids].to(dtype)


def module_rows(model: PreTrainedModel) -> Rows:
    """What the embedding module returns for each id."""
    return _tensor_rows(input_embedding(model))


def module_scale(model: PreTrainedModel) -> float:
    """The factor by which an embedding module multiplies its rows, such as Gemma's; 1 for others."""
    return float(np.float32(float(getattr(input_embedding(model), "embed_scale", 1.0))))


def _file_rows(path: Path, start: int, row_bytes: int) -> Rows:
    """Rows of blocks as they lie in a GGUF file."""
    data = map_file(path)
    return lambda first, last: data[start + first * row_bytes : start + last * row_bytes].reshape(-1, row_bytes)


def _tensor_rows(compute: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
    """Rows that PyTorch computes, as numpy stores them: bfloat16 as its bits."""
    import torch

    def rows(first: int, last: int) -> Array:
        with torch.no_grad():
            tensor = compute(torch.arange(first, last)).contiguous()
        return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()

    return rows
