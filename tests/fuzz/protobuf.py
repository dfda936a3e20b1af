"""Mutations of a protocol buffer's fields, without its schema: an ONNX graph stays well-formed around what changed."""

from __future__ import annotations

from fuzz.mutations import mutate_bytes, pick
from numpy.random import Generator

# Number and wire type of a field, and its value: a number, or the bytes of a string, a packed array or a message.
Field = tuple[int, int, "int | bytes"]
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NUMBERS = (0, 1, 2, 3, 7, 10, 11, 16, 127, 128, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_LARGEST_MESSAGE = 1 << 20


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))


def read_fields(data: bytes) -> list[Field]:
    """Fields of a message in order; raises ``ValueError`` if the bytes are none."""
    fields: list[Field] = []
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            fields.append((number, kind, value))
            continue
        if kind == _BYTES:
            size, at = _read_varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError
        if at + size > len(data):
            raise ValueError
        fields.append((number, kind, data[at : at + size]))
        at += size
    return fields


def write_fields(fields: list[Field]) -> bytes:
    parts = []
    for number, kind, value in fields:
        parts.append(_varint(number << 3 | kind))
        if isinstance(value, int):
            parts.append(_varint(value))
        else:
            parts.append(_varint(len(value)) + value if kind == _BYTES else value)
    return b"".join(parts)


def mutate_fields(rng: Generator, data: bytes, depth: int = 0) -> bytes:
    """Change one field, at a random depth."""
    try:
        fields = read_fields(data)
    except ValueError:
        return mutate_bytes(rng, data)
    if not fields:
        return mutate_bytes(rng, data)
    index = int(rng.integers(len(fields)))
    number, kind, value = fields[index]
    inner = isinstance(value, bytes) and kind == _BYTES and 2 <= len(value) <= _LARGEST_MESSAGE
    if inner and depth < 8 and rng.integers(5):
        fields[index] = number, kind, mutate_fields(rng, value, depth + 1)  # type: ignore[arg-type]
        return write_fields(fields)
    match int(rng.integers(7)):
        case 0:
            del fields[index]
        case 1:
            fields.insert(index, fields[index])
        case 2:
            other = int(rng.integers(len(fields)))
            fields[index], fields[other] = fields[other], fields[index]
        case 3:
            fields[index] = int(rng.integers(1, 30)), kind, value
        case 4:
            other = int(rng.integers(len(fields)))
            if fields[other][1] == kind:
                fields[index] = number, kind, fields[other][2]
        case _:
            fields[index] = number, kind, pick(rng, _NUMBERS) if isinstance(value, int) else mutate_bytes(rng, value)
    return write_fields(fields)


def mutate_protobuf(rng: Generator, data: bytes) -> bytes:
    """One to three fields; one time in five bytes instead."""
    if rng.integers(5) == 0:
        return mutate_bytes(rng, data)
    for _ in range(int(rng.integers(1, 4))):
        data = mutate_fields(rng, data)
    return data
