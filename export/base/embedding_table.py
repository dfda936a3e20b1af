"""The embedding table of a deployment: what the model's embedding module returns for each id, some rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.tracing.graph_weights import bits_of
from adalink.training.models.stand_ins import StandIns
from adalink.training.models.weights import read_pieces

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_HEADER_ALIGNMENT = 8


def embedding_rows(model: PreTrainedModel, stand_ins: StandIns) -> Iterator[torch.Tensor]:
    """What the embedding module of a model returns for ids in turn, shape ``(some ids, d)``."""
    import torch

    module = model.get_input_embeddings()
    weight = module.weight
    # It says which gradient is zero, and must be a row.
    padding, module.padding_idx = getattr(module, "padding_idx", None), None
    try:
        for rows in read_pieces(stand_ins.source(weight), weight.dtype):
            with torch.no_grad():
                yield torch.func.functional_call(module, {"weight": rows}, (torch.arange(len(rows)),))
    finally:
        module.padding_idx = padding


def write_table(path: Path, rows: Iterable[torch.Tensor], shape: tuple[int, int], dtype: str) -> None:
    """Write rows as the tensor ``embeddings`` of a safetensors file.

    Args:
        path: file to write, new.
        rows: all rows in turn, some at a time.
        shape: of all together.
        dtype: of the rows, one of ``adalink.runtime.storage.manifest.DTYPES``.

    Raises:
        OSError: the disk is full or read-only.
    """
    size = shape[0] * shape[1] * (4 if dtype == "float32" else 2)
    entry = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"embeddings": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for part in rows:
            stream.write(bits_of(part.contiguous()).data)
