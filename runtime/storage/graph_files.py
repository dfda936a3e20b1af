"""Files that an ONNX graph refers to: external data of its tensors, found in its bytes without the onnx package.

ONNX Runtime opens what a graph names, wherever that lies. So a graph may name only files that were verified with it.
The bytes are read as protobuf's own readers do: unknown fields are skipped, and the last of two values counts.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator

from adalink.runtime.errors import GraphError

# Field number -> message, for the messages of onnx.proto3 in which tensors and nodes lie.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {13: "entry"},
}
_OPERATOR, _KEY, _VALUE = 4, 1, 2
# An engine in a graph, or the path of one: code that no digest covers.
_ENGINE_NODE = b"EPContext"
_DEEPEST = 100  # protobuf's own limit
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


def check_graph_files(origin: str, data: bytes | memoryview, files: Collection[str]) -> tuple[str, ...]:
    """Check that a graph refers to no other files.

    Args:
        origin: the graph's path, relative to the deployment as ``files`` are.
        data: its bytes.
        files: the files that were verified.

    Returns:
        The files that it refers to.

    Raises:
        GraphError: it refers to another file, holds a compiled engine, or is no ONNX graph.
    """
    try:
        locations = sorted(set(_external_locations(memoryview(data))))
    except (ValueError, IndexError) as error:
        raise GraphError(f"{origin} is not an ONNX graph: {error}; export it again") from error
    paths = tuple(posixpath.join(posixpath.dirname(origin), location) for location in locations)
    check_referenced(origin, paths, files)
    return paths


def check_referenced(origin: str, paths: Collection[str], files: Collection[str]) -> None:
    """Check that the files which a graph refers to were verified; raises ``GraphError``."""
    for path in paths:
        if path not in files:
            raise GraphError(
                f"{origin} refers to {path!r}, expected only files that the manifest lists with it "
                f"({', '.join(files) or 'none'}): it is not what the kit exports; do not use it unless you know where "
                "it comes from, and export it again"
            )


def _external_locations(data: memoryview) -> Iterator[str]:
    """Locations of external data, as they are written in a model; raises ``ValueError``."""
    left: list[tuple[str, Span, int]] = [("model", (0, len(data)), 0)]
    while left:
        message, span, depth = left.pop()
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        inner = _MESSAGES[message]
        for number, (start, end) in _fields(data, span):
            if message == "node" and number == _OPERATOR and data[start:end] == _ENGINE_NODE:
                raise ValueError(f"it holds a compiled engine ({_ENGINE_NODE.decode()})")
            kind = inner.get(number)
            if kind == "entry":
                yield from _location(data, (start, end))
            elif kind is not None:
                left.append((kind, (start, end), depth + 1))


def _location(data: memoryview, span: Span) -> Iterator[str]:
    """The value of an entry of external data whose key is ``location``."""
    found = {_KEY: b"", _VALUE: b""}
    for number, (start, end) in _fields(data, span):
        if number in found:
            found[number] = bytes(data[start:end])
    if found[_KEY] == b"location":
        yield found[_VALUE].decode("utf-8", "backslashreplace")


def _fields(data: memoryview, span: Span) -> Iterator[tuple[int, Span]]:
    """Number and place of each field of a message that is text, bytes or a message; raises ``ValueError``."""
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise ValueError("it is truncated")
            yield tag >> 3, (at, at + size)
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field has the wire type {kind}")
    if at != end:
        raise ValueError("it is truncated")


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number, and where the next field begins."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it is truncated")
