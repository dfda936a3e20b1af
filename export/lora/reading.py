"""A LoRA of the input embedding, read as hosts read it: by names and shapes in the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adalink.export.lora.layout import GGUF_FIRST, GGUF_NUMBERS, GGUF_SECOND
from adalink.runtime.arrays import Array
from adalink.runtime.storage.adapter import CONFIG_FILE, WEIGHTS_FILE
from adalink.runtime.storage.mmap import map_file
from adalink.runtime.storage.safetensors import raw_tensors
from adalink.training.models.gguf.header import read_header


class StoredLora(NamedTuple):
    """The factors in a file, mapped.

    Attributes:
        first: ``A`` by token, shape ``(vocab, rank)``.
        second: ``B``, shape ``(d, rank)``.
        scaling: what the host multiplies their product by.
    """

    first: Array
    second: Array
    scaling: float


def read_peft(folder: Path) -> StoredLora:
    """The factors in a folder of PEFT."""
    tensors = raw_tensors(map_file(folder / WEIGHTS_FILE))
    by_part = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    fields = json.loads((folder / CONFIG_FILE).read_bytes())
    scaling = fields["lora_alpha"] / fields["r"]
    return StoredLora(by_part["lora_embedding_A"].T, by_part["lora_embedding_B"], scaling)


def read_gguf(path: Path) -> StoredLora:
    """The factors in a GGUF file of llama.cpp."""
    header, data = read_header(path), map_file(path)

    def tensor(name: str) -> Array:
        place = header.tensors[name]
        number = np.dtype(GGUF_NUMBERS[place.kind])
        count = math.prod(place.shape) * number.itemsize
        return data[place.start : place.start + count].view(number).reshape(place.shape)

    first, second = tensor(GGUF_FIRST), tensor(GGUF_SECOND)
    return StoredLora(first, second, header.metadata["adapter.lora.alpha"] / second.shape[1])
