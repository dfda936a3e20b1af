"""A GGUF file's engine without rounded activations: llama.cpp on a copy whose matrices are written out in float32.

llama.cpp rounds what it multiplies quantised matrices with. With float32 matrices, keys and values it does not, so that
what is left are the errors of the engine itself: positions, sequences, embeddings.
"""

from __future__ import annotations

import math
import struct
import tempfile
from pathlib import Path

import numpy as np

from adalink.export.lora.gguf_bytes import pack_string, pack_tensor, padded
from adalink.runtime.engine import Engine
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.tools.common.forwarding_backend import ForwardingBackend
from adalink.training.models.gguf.header import TensorPlace, read_header

_FILE_TYPE, _FLOAT32 = "general.file_type", 0
# Weights that are written at once; a multiple of every block.
_PIECE_WEIGHTS = 1 << 22


class Float32Gguf(ForwardingBackend):
    """A backend whose engines run a float32 copy of a GGUF file.

    Attributes:
        name: name of the wrapped backend.
    """

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        """Open a copy, which needs 4 bytes of disk a weight meanwhile."""
        with tempfile.TemporaryDirectory(prefix="adalink-float32-") as folder:
            path = Path(folder) / "float32.gguf"
            write_float32(graph, path)
            return self._inner.open_engine(path, base, role, table)


def write_float32(source: Path, out: Path) -> None:
    """Copy a GGUF file with all tensors in float32, piece by piece."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    header, data = read_header(source), np.memmap(source, np.uint8, "r")
    old = b"".join(pack_tensor(name, place) for name, place in header.tensors.items())
    entries, start = bytearray(data[: header.size_bytes - len(old)]), 0
    for name, place in header.tensors.items():
        entries += pack_tensor(name, TensorPlace(place.shape, _FLOAT32, start))
        start += -(-4 * math.prod(place.shape) // header.alignment) * header.alignment
    with out.open("wb") as file:
        file.write(padded(_as_float32(bytes(entries)), header.alignment))
        for place in header.tensors.values():
            kind = GGMLQuantizationType(place.kind)
            weights, size = GGML_QUANT_SIZES[kind]
            count = math.prod(place.shape)
            for first in range(0, count, _PIECE_WEIGHTS):
                last = min(first + _PIECE_WEIGHTS, count)
                blocks = data[place.start + first // weights * size : place.start + last // weights * size]
                numbers = blocks.view("<f4") if place.kind == _FLOAT32 else dequantize(blocks, kind)
                file.write(np.ascontiguousarray(numbers, "<f4").data)
            file.write(bytes(-4 * count % header.alignment))


def _as_float32(entries: bytes) -> bytes:
    """Metadata that call the file a float32 one, where they say a type: llama.cpp takes the cache's type from it."""
    key = pack_string(_FILE_TYPE)
    place = entries.find(key) + len(key) + 4
    if key not in entries:
        return entries
    return entries[:place] + struct.pack("<I", _FLOAT32) + entries[place + 4 :]
