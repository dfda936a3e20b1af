"""External data: the file beside a graph that holds its weights, written one value after another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adalink.training.models.weights import PIECE_BYTES

if TYPE_CHECKING:
    import onnx

# Smaller values stay in the graph.
FROM_BYTES = 1024
# Tensors begin at a multiple of it, larger ones at a page.
_ALIGNMENT, _PAGE = 64, 4096
_PAGE_FROM_NUMBERS = 1 << 16


def data_path(graph: Path) -> Path:
    """The file of a graph's weights."""
    return graph.with_name(f"{graph.name}.data")


class DataFile:
    """A file of weights that is written; a context manager. What it returns refers to the file by its name."""

    def __init__(self, graph: Path) -> None:
        self._stream = data_path(graph).open("ab")
        self._location = data_path(graph).name

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(
        self, name: str, data_type: int, shape: Iterable[int], pieces: Iterable[npt.NDArray[Any]]
    ) -> onnx.TensorProto:
        """Append a tensor, whose values come in pieces; returns the initializer that refers to them."""
        from onnx import TensorProto

        tensor = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        alignment = _PAGE if math.prod(tensor.dims) >= _PAGE_FROM_NUMBERS else _ALIGNMENT
        self._stream.write(bytes(-self._stream.tell() % alignment))
        start = self._stream.tell()
        for piece in pieces:
            self._stream.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        entries = {"location": self._location, "offset": start, "length": self._stream.tell() - start}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def move(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """Append an initializer that is in the graph's own bytes; a small one is returned as it is."""
        from onnx import numpy_helper

        array = numpy_helper.to_array(tensor)
        if array.nbytes < FROM_BYTES:
            return tensor
        return self.add(tensor.name, tensor.data_type, tensor.dims, [array])


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values of an initializer lie in another file."""
    return bool(tensor.data_location == tensor.EXTERNAL)


def place_of(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """File name, first byte and length of an external initializer."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0)), int(entries["length"])


def read_bytes(folder: Path, tensor: onnx.TensorProto) -> Iterable[npt.NDArray[np.uint8]]:
    """Bytes of an external initializer, some megabytes at a time."""
    name, start, length = place_of(tensor)
    with (folder / name).open("rb") as stream:
        stream.seek(start)
        while length:
            piece = stream.read(min(length, PIECE_BYTES))
            if not piece:
                raise OSError(f"{folder / name} ends within the values of {tensor.name}")
            length -= len(piece)
            yield np.frombuffer(piece, np.uint8)
