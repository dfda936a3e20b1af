"""A traced graph whose matrices are not in it yet: which weight each is, and the pass that turns them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from adalink.export.tracing.external_data import DataFile
from adalink.training.models.weights import PIECE_BYTES, Weight, read_pieces

if TYPE_CHECKING:
    import onnx
    import torch

Progress = Callable[[str], None]
_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class GraphWeight:
    """A matrix of a graph.

    Attributes:
        weight: where its values come from.
        dtype: dtype in the graph.
        is_turned: whether the graph has it transposed.
    """

    weight: Weight
    dtype: torch.dtype
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the graph."""
        return self.weight.shape[::-1] if self.is_turned else self.weight.shape

    def turned(self) -> GraphWeight:
        """The same transposed."""
        return replace(self, is_turned=not self.is_turned)

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        """Its values in the graph's order, some megabytes at a time."""
        if not self.is_turned:
            yield from (bits_of(piece) for piece in read_pieces(self.weight, self.dtype))
            return
        whole = self.weight.read()
        step = max(1, PIECE_BYTES // (max(1, whole.shape[0]) * self.dtype.itemsize))
        for start in range(0, whole.shape[1], step):
            yield bits_of(whole[:, start : start + step].t().to(self.dtype).contiguous())

    def columns(self) -> Iterator[npt.NDArray[np.float32]]:
        """Its columns in turn, ``(rows, some columns)`` in float32, contiguous, some megabytes at a time."""
        import torch

        rows, columns = self.shape
        step = max(1, PIECE_BYTES // (4 * max(1, rows)))
        whole = None if self.is_turned else self.weight.read()
        for start in range(0, columns, step):
            part = (
                self.weight.read(start, min(start + step, columns)).t()
                if whole is None
                else whole[:, start : start + step]
            )
            yield part.to(torch.float32).contiguous().numpy()


class Coding(Protocol):
    """Initializers made of one matrix, such as its codes and scales."""

    def write(self, data: DataFile) -> list[onnx.TensorProto]:
        """Append the values to ``data``; returns the initializers."""
        ...


@dataclass
class WeightedGraph:
    """A graph and its weights.

    Attributes:
        model: the graph; initializers that are in ``weights`` have a shape and no values yet.
        weights: matrices by the names of their initializers.
        codings: what initializers are made of besides.
    """

    model: onnx.ModelProto
    weights: dict[str, GraphWeight]
    codings: list[Coding] = field(default_factory=list)

    def save(self, path: Path, progress: Progress = lambda line: None) -> None:
        """Write the graph as ``path``, and its weights, one at a time, as ``<path>.data``.

        Args:
            path: file to write, new.
            progress: callback, called with a line at most once a second.
        """
        graph = self.model.graph
        waiting = [tensor for tensor in graph.initializer if tensor.name in self.weights]
        count, said = len(self.codings) + len(waiting), time.monotonic()
        written: dict[str, onnx.TensorProto] = {}
        coded: list[onnx.TensorProto] = []

        def say(done: int) -> None:
            nonlocal said
            if time.monotonic() - said >= _PROGRESS_SECONDS:
                said = time.monotonic()
                progress(f"writing {path.name}: matrix {done} of {count}")

        with DataFile(path) as data:
            for done, coding in enumerate(self.codings):
                say(done)
                coded += coding.write(data)
            for done, tensor in enumerate(waiting, len(self.codings)):
                say(done)
                weight = self.weights[tensor.name]
                written[tensor.name] = data.add(tensor.name, tensor.data_type, weight.shape, weight.pieces())
            kept = [written.get(tensor.name) or data.move(tensor) for tensor in graph.initializer]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *coded])
        path.write_bytes(self.model.SerializeToString())


def placeholder(name: str, weight: GraphWeight) -> onnx.TensorProto:
    """An initializer that has no values yet."""
    from onnx import TensorProto

    return TensorProto(
        name=name, data_type=onnx_type(weight.dtype), dims=weight.shape, data_location=TensorProto.EXTERNAL
    )


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype."""
    from onnx import TensorProto

    names = {"float32": "FLOAT", "float64": "DOUBLE", "uint8": "UINT8", "bool": "BOOL"}
    name = str(dtype).removeprefix("torch.")
    return int(getattr(TensorProto, names.get(name, name.upper())))


def bits_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Values of a contiguous tensor as an array; bfloat16, which numpy lacks, as its bits."""
    import torch

    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensor_of(name: str, values: torch.Tensor) -> onnx.TensorProto:
    """An initializer with its values in the graph's own bytes."""
    from onnx import TensorProto

    values = values.contiguous()
    return TensorProto(
        name=name, data_type=onnx_type(values.dtype), dims=values.shape, raw_data=bits_of(values).tobytes()
    )
