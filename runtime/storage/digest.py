"""SHA-256 digests of files, arrays and embedding tables, written ``sha256:<hex>``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

_CHUNK_BYTES = 1 << 20


def digest_bytes(data: bytes | memoryview) -> str:
    """Digest of ``data``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_file(path: Path) -> str:
    """Digest of a file's bytes; raises ``OSError`` as reading does."""
    with path.open("rb", buffering=0) as stream:
        return digest_stream(stream)


def digest_stream(stream: FileIO) -> str:
    """Digest of what is left to read of an unbuffered file; raises ``OSError``."""
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := stream.readinto(buffer):
        state.update(buffer[:count])
    return f"sha256:{state.hexdigest()}"


def cache_key(text: str) -> int:
    """Cache key of a prompt position that is not a token: a negative int64, which differs from all token ids."""
    return -1 - (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


def fingerprint_embeddings(weight: npt.NDArray[np.floating]) -> str:
    """Fingerprint of a base model, which ties an adapter to its model.

    SHA-256 of the ASCII text ``"{V},{d};"`` followed by the raw input embedding matrix as row-major little-endian
    float32 (docs/concepts/file-formats.md).

    Args:
        weight: input embedding matrix with shape ``(vocab, d)``, as stored in the checkpoint (before any scaling that
            the embedding module applies).
    """
    rows, width = weight.shape
    step = max(1, _CHUNK_BYTES // (4 * width))
    return fingerprint_rows((rows, width), (weight[start : start + step] for start in range(0, rows, step)))


def fingerprint_rows(shape: tuple[int, int], blocks: Iterable[npt.NDArray[np.floating]]) -> str:
    """Likewise of a matrix that comes in blocks of rows; ``shape`` is that of the whole."""
    state = hashlib.sha256("{},{};".format(*shape).encode("ascii"))
    for block in blocks:
        state.update(np.ascontiguousarray(block, dtype="<f4").data)
    return f"sha256:{state.hexdigest()}"
