"""Bytes of a GGUF header: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from adalink.training.models.gguf.header import TensorPlace

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
_STRING, _FLOAT32 = 8, 6


def pack_header(metadata: Mapping[str, str | float], tensors: Mapping[str, TensorPlace]) -> bytes:
    """Everything before the tensors, padded.

    Args:
        metadata: texts, and numbers that are stored as float32.
        tensors: shape, type and start of each tensor; a start is counted from the end of the header.
    """
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    values = b"".join(pack_string(key) + _pack_value(value) for key, value in metadata.items())
    return padded(head + values + b"".join(pack_tensor(name, place) for name, place in tensors.items()))


def pack_tensor(name: str, place: TensorPlace) -> bytes:
    """A tensor's entry in a header."""
    axes = len(place.shape)
    sizes = struct.pack(f"<I{axes}Q", axes, *reversed(place.shape))
    return pack_string(name) + sizes + struct.pack("<IQ", place.kind, place.start)


def pack_string(text: str) -> bytes:
    """A text with its length before it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def padded(data: bytes, alignment: int = ALIGNMENT) -> bytes:
    """Bytes with zeros behind, up to a multiple of ``alignment``."""
    return data + bytes(-len(data) % alignment)


def _pack_value(value: str | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + pack_string(value)
    return struct.pack("<If", _FLOAT32, value)
