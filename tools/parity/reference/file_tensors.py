"""The tensors of safetensors files, read by code of their own: the reference's way to a checkpoint's weights.

Export and reference load a model through one library. What is read here has gone through no library at all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"},
}
# Of these float32 has every number.
_WITHIN_FLOAT32 = ("float32", "float16", "bfloat16")
_PIECE_NUMBERS = 4 << 20


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file, which is mapped while it is read.

    Attributes:
        name: its name in the file.
        path: the file.
        offset: where its bytes begin.
        shape: its shape.
        dtype: name of its dtype in PyTorch.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float32(self) -> bool:
        """Whether float32 has all of its numbers."""
        return self.dtype in _WITHIN_FLOAT32

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Its rows from ``start`` to ``stop``, in its dtype, as a view of the file."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        row_numbers = math.prod(self.shape[1:])
        shape, count = (stop - start, *self.shape[1:]) if self.shape else (), (stop - start) * row_numbers
        if not count:
            return torch.empty(shape, dtype=dtype)
        begin = self.offset + start * row_numbers * dtype.itemsize
        # Copy on write: PyTorch warns of tensors that nobody may write to.
        data = np.memmap(self.path, np.uint8, "c", offset=begin, shape=(count * dtype.itemsize,))
        return torch.from_numpy(data).view(dtype).reshape(shape)


def digest_values(tensor: torch.Tensor) -> str:
    """Digest of the values of a tensor in float32."""
    import torch

    state, flat = hashlib.sha256(), tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE_NUMBERS):
        state.update(flat[start : start + _PIECE_NUMBERS].to(torch.float32).numpy().view(np.uint8).data)
    return state.hexdigest()


def file_tensors(folder: Path) -> Iterator[FileTensor]:
    """All tensors of a checkpoint.

    Raises:
        ModelError: a file cannot be read.
    """
    for path in _files(folder):
        yield from tensors_of(path)


def tensors_of(path: Path) -> list[FileTensor]:
    """All tensors of a file; raises ``ModelError`` as ``file_tensors`` does."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(start, size) - 8))
        header.pop("__metadata__", None)
        tensors = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors.append(FileTensor(name, path, start + begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]]))
            _check_bytes(tensors[-1], end - begin, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path.name} of {path.parent.name} cannot be read as safetensors: {type(error).__name__}: {error}; "
            "download it again"
        ) from error
    return tensors


def _check_bytes(tensor: FileTensor, count: int, file_bytes: int) -> None:
    import torch

    expected = math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize
    if count != expected or tensor.offset + count > file_bytes:
        raise ValueError(f"tensor {tensor.name!r} has {count} bytes in a file of {file_bytes}, expected {expected}")


def _files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{_INDEX} of {folder.name} cannot be read: {type(error).__name__}: {error}") from error
