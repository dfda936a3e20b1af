"""Loading without reading: transformers builds a model from safetensors files whose matrices are stand-ins.

transformers renames tensors, ties them and says what is missing, all by names and shapes. So it is let do that, and
afterwards each parameter of the model tells by its stand-in which tensor of which file it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.training.models.stand_ins import StandIns
from adalink.training.models.weights import SafetensorsWeight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAMPLE_ROWS = 2
# The function of transformers that is replaced is one for all threads.
_REPLACING = threading.Lock()


@contextmanager
def lazy_safetensors(stand_ins: StandIns, dtype: torch.dtype) -> Iterator[None]:
    """Let transformers get stand-ins in ``dtype`` for the matrices of safetensors files until the block ends."""
    from safetensors import safe_open

    marks = _Marks()

    def open_lazily(path: Path) -> _LazyFile:
        return _LazyFile(safe_open(path, framework="pt"), path, stand_ins, dtype, marks)

    with replaced_reader(open_lazily):
        yield


@contextmanager
def replaced_reader(open_file: Callable[[Path], Any]) -> Iterator[None]:
    """Let transformers open safetensors files with ``open_file`` until the block ends.

    Other threads get the usual files meanwhile, and wait where they want to replace them too.
    """
    from safetensors import safe_open
    from transformers import modeling_utils

    thread = threading.get_ident()

    def open_otherwise(path: Any, *arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            return open_file(Path(path))
        return safe_open(path, *arguments, **options)

    reader: Any = modeling_utils
    with _REPLACING:
        original = reader.safe_open
        reader.safe_open = open_otherwise
        try:
            yield
        finally:
            reader.safe_open = original


def is_accounted(stand_ins: StandIns, model: PreTrainedModel, info: Mapping[str, Any]) -> bool:
    """Whether every matrix of a loaded model is a whole stand-in, and every stand-in is in the model or not wanted.

    Otherwise transformers computed weights from others, such as stacked experts, and zeros are in the model.

    Args:
        stand_ins: what the model was loaded with.
        model: the model.
        info: transformers' loading info.
    """
    missing = set(info["missing_keys"])
    marks = set()
    for name, parameter in model.named_parameters():
        if parameter in stand_ins:
            if not stand_ins.is_whole(parameter):
                return False
            marks.add(_mark_of(parameter))
        elif parameter.dim() > 1 and name not in missing:
            return False
    unexpected = [str(name) for name in info["unexpected_keys"]]
    for name, tensor in stand_ins.by_name.items():
        is_wanted = not any(name.endswith(other) or other.endswith(name) for other in unexpected)
        if is_wanted and _mark_of(tensor) not in marks:
            return False
    return True


def _mark_of(tensor: torch.Tensor) -> float:
    return float(tensor.detach().view(-1)[0])


class _Marks:
    """Numbers for tensors: equal ones have the same, as transformers ties those that are equal."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], list[tuple[int, SafetensorsWeight]]] = {}
        self._count = 0

    def of(self, weight: SafetensorsWeight) -> int:
        """The mark of a tensor."""
        import torch

        sample = weight.read(0, _SAMPLE_ROWS)
        alike = self._kinds.setdefault((sample.dtype, weight.shape, float(sample.double().sum())), [])
        for mark, other in alike:
            if torch.equal(weight.read(), other.read()):
                return mark
        self._count += 1
        alike.append((self._count, weight))
        return self._count


class _LazyFile:
    """A safetensors file, of which transformers takes slices."""

    def __init__(self, file: Any, path: Path, stand_ins: StandIns, dtype: torch.dtype, marks: _Marks) -> None:
        self._file, self._path, self._stand_ins, self._dtype, self._marks = file, path, stand_ins, dtype, marks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _LazyFile:
        self._file.__enter__()
        return self

    def __exit__(self, *arguments: object) -> None:
        self._file.__exit__(*arguments)

    def get_slice(self, name: str) -> Any:
        """A slice that gives a stand-in, of a matrix; a vector is read."""
        stored = self._file.get_slice(name)
        shape = tuple(stored.get_shape())
        if len(shape) < 2 or 0 in shape or stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            return stored
        weight = SafetensorsWeight(self._path, name, shape)
        tensor = self._stand_ins.make(weight, self._dtype, self._marks.of(weight))
        self._stand_ins.by_name[name] = tensor
        return _LazySlice(stored, tensor)


class _LazySlice:
    """A slice of a file that gives a stand-in as its values."""

    def __init__(self, stored: Any, tensor: torch.Tensor) -> None:
        self._stored, self._tensor = stored, tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]
