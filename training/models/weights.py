"""Weights that are read when they are needed: a tensor of a file, of a model in memory, or several joined.

An export reads one weight at a time, so its memory follows the largest matrix and not the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

# Bytes that a matrix is read, converted and hashed by.
PIECE_BYTES = 32 << 20


class Weight(Protocol):
    """One weight of a model, wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Its rows from ``start`` to ``stop`` in their stored dtype, on the CPU; without arguments all of it."""
        ...


@dataclass(frozen=True)
class TensorWeight:
    """A weight in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows, as a view of the tensor where that is on the CPU."""
        return (self.tensor[start:stop] if self.tensor.dim() else self.tensor).detach().cpu()


@dataclass(frozen=True)
class SafetensorsWeight:
    """A tensor of a safetensors file, mapped while it is in use."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows, as a view of the file's bytes."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[start:stop]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class JoinedWeight:
    """Weights one below the other, as one."""

    parts: Sequence[Weight]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all together."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows, which may be of several parts."""
        import torch

        stop = self.shape[0] if stop is None else stop
        rows, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            if start < last and stop > first:
                rows.append(part.read(max(start - first, 0), min(stop, last) - first))
            first = last
        return torch.cat(rows) if len(rows) > 1 else rows[0]


def read_pieces(weight: Weight, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Rows of a weight in turn, in ``dtype`` and contiguous, some megabytes at a time."""
    if not weight.shape:
        yield weight.read().to(dtype)
        return
    row_bytes = max(1, math.prod(weight.shape[1:]) * dtype.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, weight.shape[0], step):
        yield weight.read(start, min(start + step, weight.shape[0])).to(dtype).contiguous()


def read_whole(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight in ``dtype``, without a second copy of it as it is stored."""
    import torch

    values, start = torch.empty(weight.shape, dtype=dtype), 0
    for piece in read_pieces(weight, dtype):
        values[start : start + len(piece)] = piece
        start += len(piece)
    return values


def digest_weight(weight: Weight) -> str:
    """Digest of a weight's values in float32."""
    import torch

    state = hashlib.sha256()
    for piece in read_pieces(weight, torch.float32):
        state.update(piece.numpy().reshape(-1).data)
    return f"sha256:{state.hexdigest()}"
