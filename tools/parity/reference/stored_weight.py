"""Weights of the reference that stay in their files: a product reads the rows that it needs, and lets go of them.

So PyTorch computes with a model in float32, and with its twin in float64, in the memory of one piece of a matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

# Bytes of a piece in the precision of its product. The allocator gives buffers of this size out again.
PIECE_BYTES = 16 << 20
_TURNED = frozenset({"T", "mT", "H", "mH"})
_METADATA = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "__len__", "data_ptr"}
)
_UNCHANGED = frozenset({"detach", "requires_grad_", "__deepcopy__", "cpu", "contiguous"})


class WeightSource(Protocol):
    """Where a weight lies: a file, a graph or a tensor in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Its rows from ``start`` to ``stop``, in the dtype in which they lie there."""
        ...


class StoredWeight(torch.Tensor):
    """A weight by its place. Linear layers and embeddings read some rows at a time; any other function all of them.

    Attributes:
        source: its place.
    """

    source: WeightSource

    @staticmethod
    def __new__(cls, source: WeightSource, dtype: torch.dtype) -> StoredWeight:
        """A weight that is computed with in ``dtype``, whatever dtype it lies in."""
        # One number for all: whatever reads it past this class computes with NaN, and no check passes.
        placeholder = torch.full((), torch.nan, dtype=dtype).expand(source.shape)
        weight: StoredWeight = torch.Tensor._make_subclass(cls, placeholder)
        weight.source = source
        weight._is_param = True  # for ``isinstance(weight, torch.nn.Parameter)``
        return weight

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what needs no values; read pieces for products; else read the whole weight."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if args and isinstance(args[0], StoredWeight):
                name = function.__name__
                if name == "__get__" and function.__self__.__name__ not in _TURNED:
                    return args[0] if function.__self__.__name__ == "data" else function(*args, **kwargs)
                if name in _METADATA:
                    return function(*args, **kwargs)
                if name in _UNCHANGED or (name == "to" and args[0].is_as_wanted(*args[1:], **kwargs)):
                    return args[0]
                if _changes(name):
                    raise RuntimeError(f"{name} would change a weight that lies in a file: it is read-only")
                if name == "__getitem__" and isinstance(args[1], (int, slice)):
                    return args[0].rows(args[1])
            if function in _PRODUCTS and len(args) > 1 and isinstance(args[1], StoredWeight):
                return _PRODUCTS[function](*args, **kwargs)
            whole = tree_map_only(StoredWeight, StoredWeight.whole, (args, dict(kwargs)))
            return function(*whole[0], **whole[1])

    def is_as_wanted(self, *wanted: Any, **named: Any) -> bool:
        """Whether ``to`` with these arguments changes nothing."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.to(*wanted, **named) is empty

    def rows(self, index: int | slice) -> torch.Tensor:
        """Some rows, or one; raises ``IndexError`` as an index of a tensor does."""
        count = self.shape[0]
        if isinstance(index, int):
            row = range(count)[index]
            return self.source.read(row, row + 1)[0].to(self.dtype)
        start, stop, step = index.indices(count)
        return self.source.read(start, max(start, stop))[::step].to(self.dtype)

    def whole(self) -> torch.Tensor:
        """All of it, as an ordinary tensor."""
        values = torch.empty(self.shape, dtype=self.dtype)
        for place, rows in self.pieces():
            values[place] = rows
        return values

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Its rows in turn, some at a time, and their places."""
        count = self.shape[0]
        step = max(1, PIECE_BYTES // max(1, self.shape[1:].numel() * self.dtype.itemsize))
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield slice(start, stop), self.source.read(start, stop).to(self.dtype)


@contextmanager
def in_memory(model: torch.nn.Module) -> Iterator[None]:
    """Read all weights of a model once, and keep them until the block ends."""
    stored = {id(weight): weight for weight in model.parameters() if isinstance(weight, StoredWeight)}
    loaded = {key: torch.nn.Parameter(weight.whole(), requires_grad=False) for key, weight in stored.items()}
    _exchange(model, lambda tensor: loaded.get(id(tensor), tensor))
    try:
        yield
    finally:
        back = {id(parameter): stored[key] for key, parameter in loaded.items()}
        _exchange(model, lambda tensor: back.get(id(tensor), tensor))


def in_float64(model: torch.nn.Module) -> Any:
    """A copy of a model that computes in float64. It has no matrices of its own: it reads those of ``model``."""
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            source = parameter.source if isinstance(parameter, StoredWeight) else TensorSource(parameter.detach())
            known[id(parameter)] = StoredWeight(source, torch.float64)
    twin = copy.deepcopy(model, dict(known))
    changed: dict[int, Any] = {}

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, StoredWeight) or not tensor.is_floating_point():
            return tensor
        if id(tensor) not in changed:
            values = tensor.detach().double()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            changed[id(tensor)] = torch.nn.Parameter(values, requires_grad=False) if is_parameter else values
        return changed[id(tensor)]  # type: ignore[no-any-return]

    _exchange(twin, widened)
    return twin


def pieces_of(weight: torch.Tensor | WeightSource) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a weight in turn, some at a time, and their places: a tensor's in its dtype, others in float32."""
    if isinstance(weight, StoredWeight):
        return weight.pieces()
    if isinstance(weight, torch.Tensor):
        return StoredWeight(TensorSource(weight.detach()), weight.dtype).pieces()
    return StoredWeight(weight, torch.float32).pieces()


class TensorSource:
    """A weight in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows, as a view."""
        return self._tensor[start:stop]


def _changes(name: str) -> bool:
    """Whether a method changes its tensor; a change of a weight's copy would be lost without a word."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _exchange(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = change(tensor)  # type: ignore[assignment]


def _linear(inputs: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    outputs = inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))
    for place, rows in weight.pieces():
        outputs[..., place] = functional.linear(inputs, rows, None if bias is None else bias[place])
    return outputs


def _embedding(ids: torch.Tensor, weight: StoredWeight, *options: Any, **named: Any) -> torch.Tensor:
    """Rows by ids; what the options change, gradients and norms, does not happen here."""
    rows: torch.Tensor = weight.source.read()[ids.reshape(-1)].to(weight.dtype)
    return rows.reshape(*ids.shape, *weight.shape[1:])


_PRODUCTS: dict[Any, Callable[..., torch.Tensor]] = {functional.linear: _linear, functional.embedding: _embedding}
