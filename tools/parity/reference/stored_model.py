"""The reference model as transformers loads it in float32, with its matrices left in the files.

transformers opens safetensors files through ``_StoredFile``, which gives a ``StoredWeight`` for each matrix. Names,
ties and buffers are those of a whole load. What transformers computes of a matrix, it computes with its values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.tools.parity.reference.file_tensors import FileTensor, tensors_of

if TYPE_CHECKING:
    import torch


def load_stored(spec: str | Path) -> Any:
    """The model of ``load_base``, in float32; the weights of a GGUF file are in memory. Raises ``ModelError``."""
    from adalink.training.models.lazy_files import replaced_reader
    from adalink.training.models.loading import load_base

    with replaced_reader(_StoredFile):
        return load_base(spec)


class _StoredFile:
    """A safetensors file, as transformers uses one."""

    def __init__(self, path: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors_of(path)}

    def __enter__(self) -> _StoredFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> list[str]:
        """Names of its tensors."""
        return list(self._tensors)

    def get_slice(self, name: str) -> _StoredSlice:
        """A tensor that is not read yet."""
        return _StoredSlice(self._tensors[name])


class _StoredSlice:
    """A tensor of a file. A whole matrix stays there; a vector, a part and what float32 rounds are read."""

    def __init__(self, tensor: FileTensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        from adalink.tools.parity.reference.stored_weight import StoredWeight

        is_matrix = len(self._tensor.shape) > 1 and 0 not in self._tensor.shape
        if index is Ellipsis and is_matrix and self._tensor.is_float32:
            return StoredWeight(self._tensor, torch.float32)
        return self._tensor.read()[index].clone()
