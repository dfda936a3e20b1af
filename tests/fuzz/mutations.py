"""Seeded mutations of bytes, text, JSON and safetensors: the same generator gives the same result.

Each takes a generator and what it changes, and returns the changed bytes. A mutation may by chance change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from numpy.random import Generator

Mutation = Callable[[Generator, bytes], bytes]

# Written into JSON as they stand: what Python's own writer cannot write.
_RAW = {
    "@infinite@": "1e400",
    "@digits@": "1" * 5000,
    "@nan@": "NaN",
    "@half@": '"\\ud800"',
    "@deep@": "[" * 3000 + "]" * 3000,
}
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    255,
    256,
    65536,
    2**31 - 1,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.0,
    -0.0,
    0.5,
    1e-45,
    1e38,
    1e308,
    -1e308,
    "",
    " ",
    "a",
    "0",
    "-1",
    "é",
    "\x00",
    "\x1b[31m",
    "\n",
    "a" * 5000,
    "../../escape",
    "/etc/passwd",
    "C:\\x",
    "..",
    ".",
    "{}",
    "{{ 1 }}",
    "%s",
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0] * 50,
    {"a": {"b": [1]}},
    "float16",
    "bfloat16",
    "float32",
    "F32",
    "BF16",
    "I8",
    "sha256:" + "0" * 64,
    *_RAW,
)


def pick(rng: Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def new_value(rng: Generator) -> Any:
    """A value of its own: the next mutation may change it in place, and ``VALUES`` must stay as they are."""
    return deepcopy(pick(rng, VALUES))


def flip_bits(rng: Generator, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if changed:
            changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def set_bytes(rng: Generator, data: bytes) -> bytes:
    """Overwrite a short run with an extreme byte, or with random ones."""
    start = int(rng.integers(len(data) + 1))
    count = int(rng.integers(1, 17))
    run = (
        rng.bytes(count) if rng.integers(2) else bytes([pick(rng, (0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B))]) * count
    )
    return data[:start] + run + data[start + count :]


def truncate(rng: Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def extend(rng: Generator, data: bytes) -> bytes:
    return data + (rng.bytes(int(rng.integers(1, 64))) if rng.integers(2) else bytes(int(rng.integers(1, 64))))


def _span(rng: Generator, data: bytes) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(len(data), start + int(2 ** (rng.random() * 10)))


def delete(rng: Generator, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def duplicate(rng: Generator, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def splice(rng: Generator, data: bytes) -> bytes:
    """Copy one span over another place."""
    start, end = _span(rng, data)
    place = int(rng.integers(len(data) + 1))
    return data[:place] + data[start:end] + data[place + end - start :]


def insert(rng: Generator, data: bytes) -> bytes:
    place = int(rng.integers(len(data) + 1))
    return data[:place] + rng.bytes(int(rng.integers(1, 9))) + data[place:]


def nothing_left(rng: Generator, data: bytes) -> bytes:
    return pick(rng, (b"", b"\x00" * len(data), b"\xff" * len(data), b"{}", b"[]", b"null", b"version https://git-lfs"))


BYTES: tuple[Mutation, ...] = (
    flip_bits,
    flip_bits,
    set_bytes,
    set_bytes,
    truncate,
    extend,
    delete,
    duplicate,
    splice,
    insert,
    nothing_left,
)


def mutate_bytes(rng: Generator, data: bytes) -> bytes:
    return pick(rng, BYTES)(rng, data)


Place = tuple[Any, Any]


def _places(value: Any, found: list[Place]) -> list[Place]:
    """Every container and key below ``value``."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _places(value[key], found)
    return found


def _near(rng: Generator, value: Any) -> Any:
    """Something like the value."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return pick(rng, (value + 1, value - 1, -value, 2 * value, value // 2, value + 2**32, float(value), str(value)))
    if isinstance(value, float):
        return pick(rng, (-value, value * 1e30, value * 1.01, int(value) if abs(value) < 1e30 else 0, str(value)))
    if isinstance(value, str):
        middle = int(rng.integers(len(value) + 1))
        return pick(
            rng,
            (
                value[:middle],
                value[:middle] + pick(rng, "aZ0/.\x00é{") + value[middle:],
                value.upper(),
                value * 2,
                [value],
            ),
        )
    if isinstance(value, list):
        return pick(
            rng, (value[:-1], value + deepcopy(value), value[::-1], [value], value[:1], [*value, new_value(rng)])
        )
    if isinstance(value, dict):
        return pick(rng, (list(value.items()), list(value), {**value, "unknown": 1}, {"": value}))
    return new_value(rng)


def mutate_value(rng: Generator, root: Any) -> None:
    """Change one place of a JSON value in place."""
    places = _places(root, [])
    if not places:
        return
    container, key = pick(rng, places)
    action = int(rng.integers(10))
    if action == 0:
        del container[key]
    elif action == 1:
        other, other_key = pick(rng, places)
        container[key], other[other_key] = (
            other[other_key],
            container[key] if not _holds(container[key], other) else None,
        )
    elif action == 2 and isinstance(container, dict):
        container[_near(rng, key) if isinstance(_near(rng, key), str) else str(key) + "x"] = container.pop(key)
    elif action <= 5:
        container[key] = _near(rng, container[key])
    else:
        container[key] = new_value(rng)


def _holds(value: Any, other: Any) -> bool:
    return value is other or any(child is other for container, key in _places(value, []) for child in [container[key]])


def dump_json(value: Any, **settings: Any) -> bytes:
    try:
        text = json.dumps(value, **settings)
    except (ValueError, RecursionError, TypeError):  # two places exchanged made a circle
        return b"null"
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode("utf-8", "surrogatepass")


def mutate_json(rng: Generator, data: bytes) -> bytes:
    """One to three places of a JSON text; one time in four its bytes instead."""
    if rng.integers(4) == 0:
        return mutate_bytes(rng, data)
    try:
        value = json.loads(data)
    except ValueError:
        return mutate_bytes(rng, data)
    for _ in range(int(rng.integers(1, 4))):
        try:
            mutate_value(rng, value)
        except (KeyError, IndexError, TypeError):  # a place that the change before removed
            continue
    return dump_json(value)


def mutate_text(rng: Generator, data: bytes, words: Sequence[str], end: bytes = b"\n") -> bytes:
    """Lines of a text: deleted, doubled, exchanged, or with a word put in; one time in four its bytes instead."""
    if rng.integers(4) == 0:
        return mutate_bytes(rng, data)
    for _ in range(int(rng.integers(1, 4))):
        lines = data.split(end)
        row, other = int(rng.integers(len(lines))), int(rng.integers(len(lines)))
        match int(rng.integers(6)):
            case 0:
                del lines[row]
            case 1:
                lines.insert(row, lines[other])
            case 2:
                lines[row], lines[other] = lines[other], lines[row]
            case 3:
                lines[row] = mutate_bytes(rng, lines[row])
            case _:
                word = pick(rng, words).encode("utf-8", "surrogatepass")
                place = int(rng.integers(len(lines[row]) + 1))
                lines[row] = lines[row][:place] + word + lines[row][place + int(rng.integers(len(word) + 1)) :]
        data = end.join(lines)
    return data


_NUMBERS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00")


def mutate_safetensors(rng: Generator, data: bytes) -> bytes:
    """The header's length, its JSON, or numbers behind it: not a number, infinite, the largest, the smallest."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match int(rng.integers(5)):
        case 0:
            return mutate_bytes(rng, data)
        case 1 | 2:
            changed = mutate_json(rng, header)
            return len(changed).to_bytes(8, "little") + changed + body
        case 3:
            wrong = pick(rng, (0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1))
            return wrong.to_bytes(8, "little") + header + body
        case _:
            if not body:
                return data
            place = 4 * int(rng.integers(len(body) // 4 + 1))
            return data[: 8 + length] + body[:place] + pick(rng, _NUMBERS) + body[place + 4 :]
