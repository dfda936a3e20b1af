"""Header of a GGUF file: its metadata, and the names of its tensors, without reading a weight.

A reader of the kit's own, so that what transformers makes of a file is compared with the file itself. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ModelError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# An array of more values than this is a vocabulary or a score table; its length stands for it.
_LONGEST_ARRAY = 4096
_ALIGNMENT = 32
_MOST_AXES = 8
_FLOAT32 = 0


class TensorPlace(NamedTuple):
    """Place of a tensor: its shape, ggml type, and first byte from the start of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int

    @property
    def type(self) -> str:
        """Name of its ggml type, such as ``"Q4_0"``; its number if the ``gguf`` package does not know it."""
        from gguf import GGMLQuantizationType

        known = {int(entry): str(entry.name) for entry in GGMLQuantizationType}
        return known.get(self.kind, str(self.kind))


@dataclass(frozen=True)
class GgufHeader:
    """Header of a GGUF file.

    Attributes:
        name: file name, for messages.
        metadata: value of each key; the length of an array that is long and was not asked for.
        tensors: place of each tensor in the file.
        size_bytes: bytes of the header; tensors begin at the next multiple of the alignment.
        alignment: of tensors, in bytes.
    """

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    size_bytes: int
    alignment: int

    @property
    def tensors_start(self) -> int:
        """First byte that may belong to a tensor."""
        return -(-self.size_bytes // self.alignment) * self.alignment

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(self.metadata["general.architecture"])


def read_header(path: str | Path, arrays: Collection[str] = ()) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        path: the file.
        arrays: keys of long arrays to read in full.

    Raises:
        ModelError: it is no GGUF file, of an unknown version, truncated, or a part of a split one.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data, arrays).header(path.name)
    except OSError as error:
        raise ModelError(f"base model {path.name}: cannot read it: {error.strerror or error}") from error
    except (ValueError, struct.error, KeyError) as error:  # an empty file, a length beyond the end, text not UTF-8
        raise ModelError(
            f"base model {path.name} is no complete GGUF file: {error}; expected the magic bytes, metadata and tensors "
            "of version 2 or 3: download or convert it again"
        ) from error


def read_float32(path: str | Path, place: TensorPlace) -> npt.NDArray[np.float32] | None:
    """Values of a small tensor stored in float32; ``None`` if it is stored otherwise, or not all there."""
    count = int(np.prod(place.shape, dtype=np.int64))
    if place.kind != _FLOAT32:
        return None
    with Path(path).open("rb") as file:
        file.seek(place.start)
        data = file.read(4 * count)
    return np.frombuffer(data, "<f4").reshape(place.shape) if len(data) == 4 * count else None


class _Parser:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap, arrays: Collection[str]) -> None:
        self._data, self._position, self._arrays = data, 0, arrays

    def header(self, name: str) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version, tensors, keys = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}")
        metadata = {}
        for _ in range(keys):
            key = self._string()
            metadata[key] = self._value(self._unpack("I")[0], whole=key in self._arrays)
        parts = metadata.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise ModelError(
                f"base model {name} is one of the {parts} files of a split GGUF file, and the kit reads whole ones: "
                "join them with 'llama-gguf-split --merge FIRST OUT' of llama.cpp, FIRST being the file -00001-of-, "
                "and give OUT"
            )
        if not isinstance(metadata.get("general.architecture"), str):
            raise ValueError("it has no general.architecture")
        places = dict(self._tensor() for _ in range(tensors))
        alignment = int(metadata.get("general.alignment", _ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"its general.alignment is {alignment}")
        header = GgufHeader(name, metadata, {}, self._position, alignment)
        start = header.tensors_start
        header.tensors.update((key, place._replace(start=start + place.start)) for key, place in places.items())
        return header

    def _tensor(self) -> tuple[str, TensorPlace]:
        name = self._string()
        (axes,) = self._unpack("I")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name!r} has {axes} axes")
        shape = self._unpack(f"{axes}Q")
        kind, offset = self._unpack("IQ")
        return name, TensorPlace(tuple(reversed(shape)), kind, offset)

    def _value(self, kind: int, whole: bool) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_NUMBERS[kind])[0]
        kind, length = self._unpack("IQ")
        keep = whole or length <= _LONGEST_ARRAY
        if kind != _STRING:
            width = struct.calcsize(f"<{_NUMBERS[kind]}")
            values = self._bytes(length * width)
            return list(struct.unpack(f"<{length}{_NUMBERS[kind]}", values)) if keep else length
        if keep:
            return [self._string() for _ in range(length)]
        for _ in range(length):
            self._bytes(self._unpack("Q")[0])
        return length

    def _string(self) -> str:
        return self._bytes(self._unpack("Q")[0]).decode()

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))

    def _bytes(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise ValueError(f"it ends at byte {len(self._data)}, before a value that ends at {end}")
        value = self._data[self._position : end]
        self._position = end
        return value
