"""Stand-ins: tensors in the place of a model's matrices while it is described and traced, without their memory.

A stand-in has the shape and the dtype of its matrix. Its numbers are zeros that the system keeps no memory for, but for
the first one. Each stand-in knows the ``Weight`` that it stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from adalink.training.models.weights import TensorWeight, Weight, read_whole

if TYPE_CHECKING:
    import torch

    Module = TypeVar("Module", bound=torch.nn.Module)


class StandIns:
    """Stand-ins of one model, by their storage.

    Attributes:
        by_name: stand-ins of a checkpoint's tensors, by the names that its files give them.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        # Tensors are kept, so that no address is used again.
        self._known: dict[int, tuple[torch.Tensor, Weight]] = {}

    def make(self, weight: Weight, dtype: torch.dtype, mark: int = 0) -> torch.Tensor:
        """A stand-in for ``weight`` in ``dtype``; ``mark`` is its first number, the others are zeros."""
        import numpy as np
        import torch

        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.itemsize]
        tensor = torch.from_numpy(np.zeros(weight.shape, bits)).view(dtype)
        if mark:
            tensor.view(-1)[0] = mark
        self._known[_storage(tensor)] = tensor, weight
        return tensor

    def clear(self) -> None:
        """Forget all stand-ins."""
        self.by_name.clear()
        self._known.clear()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a stand-in."""
        return not tensor.is_meta and _storage(tensor) in self._known

    def source(self, tensor: torch.Tensor) -> Weight:
        """The weight that ``tensor`` stands for; any other tensor stands for itself."""
        if tensor not in self:
            return TensorWeight(tensor)
        whole, weight = self._known[_storage(tensor)]
        if not self.is_whole(tensor):
            raise AssertionError(f"a part of a stand-in of shape {tuple(whole.shape)} says nothing of its values")
        return weight

    def is_whole(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, a stand-in, has the shape and dtype that it was made with, and is no part of one."""
        whole, _ = self._known[_storage(tensor)]
        return tensor.shape == whole.shape and tensor.stride() == whole.stride() and tensor.dtype == whole.dtype

    def convert(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Give a model's stand-ins another dtype, in place; what is tied stays tied."""

        def in_dtype(tensor: torch.Tensor) -> torch.Tensor:
            if tensor not in self or tensor.dtype == dtype:
                return tensor
            return self.make(self.source(tensor), dtype)

        apply: Any = model._apply
        apply(in_dtype)

    def skeleton(self, model: Module) -> Module:
        """A copy of a model with stand-ins for its matrices; the model keeps its own.

        What a parametrised weight is computed from is copied with its values, as others read that weight.
        """
        import torch
        from torch.nn.utils.parametrize import ParametrizationList

        parts = [part for part in model.modules() if isinstance(part, ParametrizationList)]
        kept = {id(parameter) for part in parts for parameter in part.parameters()}
        copies: dict[int, object] = {}
        for parameter in model.parameters():
            is_matrix = parameter.dim() > 1 and parameter.is_floating_point() and not parameter.is_meta
            if is_matrix and id(parameter) not in kept:
                tensor = self.make(TensorWeight(parameter.detach()), parameter.dtype)
                copies[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=False)
        return copy.deepcopy(model, copies)

    @contextmanager
    def filled(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Give parameters their values until the block ends."""
        before = [(parameter, parameter.data) for parameter in parameters if parameter in self]
        try:
            self.fill(parameter for parameter, _ in before)
            yield
        finally:
            for parameter, stand_in in before:
                parameter.data = stand_in

    def fill(self, parameters: Iterable[torch.Tensor]) -> None:
        """Give parameters their values for good."""
        for parameter in parameters:
            if parameter in self:
                parameter.data = read_whole(self.source(parameter.data), parameter.dtype)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
