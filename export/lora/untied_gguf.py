"""A copy of a GGUF model whose head has a matrix of its own.

llama.cpp finds the weights of a LoRA by the name of a tensor. A model whose file has no ``output.weight`` takes the
embeddings for its head, and llama.cpp then applies a LoRA of the embeddings to the head too, and ends with an error.
The copy holds the same matrix once more under the name of the head: it computes what the file does.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from adalink.export.lora.gguf_bytes import pack_tensor, padded
from adalink.runtime.errors import ConfigError, DeploymentError, ModelError
from adalink.runtime.storage.atomic import draft_file, make_folder
from adalink.training.models.gguf.header import GgufHeader, TensorPlace, read_header

_TABLE, _HEAD = "token_embd.weight", "output.weight"
# The number of tensors, behind the magic and the version.
_COUNT_AT = 8
_PIECE_BYTES = 1 << 20


def is_tied(path: Path) -> bool:
    """Whether a GGUF file has no matrix for its head; raises ``ModelError`` if it cannot be read."""
    return _HEAD not in read_header(path).tensors


def check_untied_place(source: Path, out: Path, *, replace: bool) -> None:
    """Check that a copy can be written; raises ``ConfigError`` or ``DeploymentError``."""
    header = read_header(source)
    if _HEAD in header.tensors:
        raise ConfigError(f"{source.name} has a tensor {_HEAD!r} already: leave --untied-base out")
    if _TABLE not in header.tensors or header.metadata.get("split.count", 1) > 1:
        raise ConfigError(f"{source.name} has no tensor {_TABLE!r}, or is one of several files: join them first")
    if out.is_dir() or (out.exists() and out.samefile(source)):
        raise DeploymentError(f"{out} is a folder or the model itself: name another file for its copy")
    if out.exists() and not _is_copy(out, header):
        raise DeploymentError(
            f"{out} is there, and is no such copy of {source.name}: it is not replaced; choose another"
        )
    if out.exists() and not replace:
        raise DeploymentError(f"{out} is there already: pass --replace to write it again")


def _is_copy(path: Path, source: GgufHeader) -> bool:
    """Whether a file is what ``write_untied`` makes of a model with this header, as far as its own header tells."""
    try:
        header = read_header(path)
    except ModelError:
        return False
    return header.metadata == source.metadata and header.tensors.keys() == {*source.tensors, _HEAD}


def write_untied(source: Path, out: Path) -> int:
    """Copy a GGUF model with the matrix of its head written out (``check_untied_place``), piece by piece.

    Args:
        source: the model.
        out: the copy.

    Returns:
        Bytes of the copy.

    Raises:
        WriteError: the disk refused: full, read-only or without permission.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header = read_header(source)
    table = header.tensors[_TABLE]
    group, size = GGML_QUANT_SIZES[GGMLQuantizationType(table.kind)]
    table_bytes = math.prod(table.shape) // group * size
    data_bytes = source.stat().st_size - header.tensors_start
    head_start = -(-data_bytes // header.alignment) * header.alignment
    make_folder(out.absolute().parent)
    with source.open("rb") as model, draft_file(out) as (copy, _):
        entries = bytearray(model.read(header.size_bytes))
        entries[_COUNT_AT : _COUNT_AT + 8] = struct.pack("<Q", len(header.tensors) + 1)
        entries += pack_tensor(_HEAD, TensorPlace(table.shape, table.kind, head_start))
        copy.write(padded(bytes(entries), header.alignment))
        _copy(model, header.tensors_start, data_bytes, copy)
        copy.write(bytes(head_start - data_bytes))
        _copy(model, table.start, table_bytes, copy)
    return out.stat().st_size


def _copy(source: BinaryIO, start: int, count: int, out: BinaryIO) -> None:
    source.seek(start)
    while count:
        piece = source.read(min(count, _PIECE_BYTES))
        if not piece:
            raise OSError(f"the model ends {count} bytes too early")
        out.write(piece)
        count -= len(piece)
