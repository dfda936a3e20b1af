"""Layouts of a LoRA of the input embedding on disk: PEFT's safetensors, and llama.cpp's GGUF."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adalink.export.lora.gguf_bytes import ALIGNMENT, pack_header
from adalink.runtime.arrays import Array
from adalink.runtime.storage.safetensors import aligned_header
from adalink.training.models.gguf.header import TensorPlace

NUMBERS = {"float32": "<f4", "float16": "<f2"}
_CODES = {"float32": "F32", "float16": "F16"}
# ggml's types of the same numbers.
_GGML_TYPES = {"float32": 0, "float16": 1}
GGUF_NUMBERS = {_GGML_TYPES[dtype]: number for dtype, number in NUMBERS.items()}
GGUF_FIRST, GGUF_SECOND = "token_embd.weight.lora_a", "token_embd.weight.lora_b"


@dataclass(frozen=True)
class LoraShape:
    """Sizes of a LoRA's factors.

    Attributes:
        tokens: size of the vocabulary.
        rank: width of the LoRA.
        width: width of the embeddings.
        dtype: of the numbers: ``"float32"`` or ``"float16"``.
    """

    tokens: int
    rank: int
    width: int
    dtype: str

    @property
    def first_bytes(self) -> int:
        """Bytes of ``A``."""
        return self.tokens * self.rank * self.number.itemsize

    @property
    def number(self) -> np.dtype[Any]:
        """Numpy's dtype of a number."""
        return np.dtype(NUMBERS[self.dtype])


@dataclass(frozen=True)
class LoraLayout:
    """A file with both factors; ``A`` is written in pieces, so that no more than a piece is in memory.

    Attributes:
        header: everything before the factors.
        shape: their sizes.
        by_token: whether ``A`` lies in rows of one token each, ``(tokens, rank)``; otherwise it is turned.
        second_start: first byte of ``B``, which has shape ``(d, rank)``.
    """

    header: bytes
    shape: LoraShape
    by_token: bool
    second_start: int

    def begin(self, file: BinaryIO, second: npt.NDArray[np.float32]) -> None:
        """Write the header and ``B``, float32 ``(d, rank)``."""
        file.write(self.header)
        file.seek(self.second_start)
        file.write(self._stored(second).data)

    def write_rows(self, file: BinaryIO, first: int, rows: Array) -> None:
        """Write the rows of consecutive tokens, shape ``(tokens, rank)``, from the token ``first`` on."""
        shape, size, start = self.shape, self.shape.number.itemsize, len(self.header)
        if self.by_token:
            file.seek(start + first * shape.rank * size)
            file.write(self._stored(rows).data)
            return
        for row, values in enumerate(self._stored(rows.T)):
            file.seek(start + (row * shape.tokens + first) * size)
            file.write(values.data)

    def _stored(self, values: Array) -> Array:
        return np.ascontiguousarray(values, self.shape.number)


def peft_layout(shape: LoraShape, embedding: str, metadata: dict[str, str]) -> LoraLayout:
    """``adapter_model.safetensors`` of PEFT 0.21; ``embedding`` is the path of the module in the model."""
    size, second = shape.first_bytes, shape.width * shape.rank * shape.number.itemsize
    module, code = f"base_model.model.{embedding}", _CODES[shape.dtype]
    entries = {
        "__metadata__": {"format": "pt", **metadata},
        f"{module}.lora_embedding_A": _entry(code, (shape.rank, shape.tokens), 0, size),
        f"{module}.lora_embedding_B": _entry(code, (shape.width, shape.rank), size, size + second),
    }
    header = aligned_header(json.dumps(entries).encode())
    return LoraLayout(header, shape, by_token=False, second_start=len(header) + size)


def gguf_layout(shape: LoraShape, architecture: str, alpha: float, metadata: dict[str, str]) -> LoraLayout:
    """A LoRA as llama.cpp's ``convert_lora_to_gguf.py`` writes it.

    Args:
        shape: its sizes.
        architecture: ``general.architecture`` of the model that it is for.
        alpha: PEFT's ``lora_alpha``.
        metadata: further texts by key.
    """
    kind = _GGML_TYPES[shape.dtype]
    second = -(-shape.first_bytes // ALIGNMENT) * ALIGNMENT
    header = pack_header(
        {
            "general.architecture": architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": float(alpha),
            **metadata,
        },
        {
            GGUF_FIRST: TensorPlace((shape.tokens, shape.rank), kind, 0),
            GGUF_SECOND: TensorPlace((shape.width, shape.rank), kind, second),
        },
    )
    return LoraLayout(header, shape, by_token=True, second_start=len(header) + second)


def _entry(code: str, shape: tuple[int, int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
