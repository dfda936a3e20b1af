"""Weights of a GGUF file, read one at a time: dequantised, and in the layout of the model.

Which tensor fills which weight is said by the ``gguf`` package, and the layouts are those that llama.cpp's converter
writes: rows of Llama's queries and keys are in another order, Gemma's norms hold one more, GPT-2's matrices are turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adalink.training.models.gguf.header import GgufHeader, TensorPlace
from adalink.training.models.gguf.tensors import gguf_names
from adalink.training.models.stand_ins import StandIns

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Float32 = npt.NDArray[np.float32]
# Architectures whose layouts are said here; T5, whose head is looked at, is loaded whole.
_LAZY = ("gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3")
_PIECE_BYTES = 1 << 20
# Kinds that numpy has.
_PLAIN = {"F32": "<f4", "F16": "<f2"}
_TURNED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def is_lazy(header: GgufHeader) -> bool:
    """Whether the weights of a file can be read one at a time."""
    return header.architecture in _LAZY


@dataclass(frozen=True)
class GgufWeight:
    """A tensor of a GGUF file as a weight of the model, in float32.

    Attributes:
        path: the file.
        name: its name in the file.
        place: where it lies.
        layout: what the file's layout differs in: ``""``, ``"turned"``, ``"one-more"``, or ``"rotated"``.
        heads: of queries or keys in a ``"rotated"`` layout.
    """

    path: Path
    name: str
    place: TensorPlace
    layout: str = ""
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the model."""
        return self.place.shape[::-1] if self.layout == "turned" else self.place.shape

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows, dequantised; of a layout that mixes rows all are dequantised for it."""
        import torch

        if len(self.shape) == 1 or self.layout in ("turned", "rotated"):
            return torch.from_numpy(self._laid_out(self._dequantized(0, None)))[start:stop]
        return torch.from_numpy(self._laid_out(self._dequantized(start, stop)))

    def _dequantized(self, start: int, stop: int | None) -> Float32:
        """Rows of the tensor in the file's layout; a vector is one row."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self.place.kind)
        numbers, size = GGML_QUANT_SIZES[kind]
        count, columns = (1, *self.place.shape)[-2:]
        row_bytes = columns // numbers * size
        data = np.memmap(self.path, np.uint8, "r", self.place.start, (count, row_bytes))[start:stop]
        values = np.empty((len(data), columns), np.float32)
        step = max(1, _PIECE_BYTES // row_bytes)
        for first in range(0, len(data), step):  # the package takes several times the memory of the result
            part = data[first : first + step]
            values[first : first + step] = dequantize(part.view(_PLAIN.get(kind.name, np.uint8)), kind)
        return values if len(self.shape) > 1 else values[0]

    def _laid_out(self, values: Float32) -> Float32:
        """Values in the layout of the model."""
        if self.layout == "turned":
            return np.ascontiguousarray(values.T)
        if self.layout == "one-more":
            return values - np.float32(1)
        if self.layout == "rotated":  # the two halves of a head lie interleaved in the file
            pairs = values.reshape(self.heads, -1, 2, *values.shape[1:])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        return values


def load_lazily(
    header: GgufHeader, path: Path, auto_class: Any, config: PretrainedConfig, stand_ins: StandIns
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model from a GGUF file, with stand-ins for its matrices.

    Args:
        header: the file's header.
        path: the file.
        auto_class: the transformers auto class of the model.
        config: its config.
        stand_ins: takes up the matrices.

    Returns:
        The model, and transformers' loading info.
    """
    import torch

    kind = auto_class._model_mapping[type(config)]
    with torch.device("meta"):
        empty = kind(config)
    state = {}
    for index, (name, stored) in enumerate(gguf_names(header.architecture, empty).items()):
        if stored not in header.tensors:
            continue
        weight = _weight(header, path, stored, config)
        if len(weight.shape) > 1:
            state[name] = stand_ins.by_name[name] = stand_ins.make(weight, torch.float32, index + 1)
        else:
            state[name] = weight.read()
    return kind.from_pretrained(  # type: ignore[no-any-return]
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )


def _weight(header: GgufHeader, path: Path, name: str, config: Any) -> GgufWeight:
    """A tensor with what its architecture lays out differently."""
    place, architecture = header.tensors[name], header.architecture
    layout, heads = "", 0
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        layout = "rotated"
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    elif architecture == "gemma3" and name.endswith("norm.weight"):
        layout = "one-more"
    elif architecture == "gpt2" and name.endswith(".weight") and any(part in name for part in _TURNED):
        layout = "turned"
    return GgufWeight(path, name, place, layout, heads)
