"""Weights that llama.cpp runs, which are the file's own: named anew, and compared with the model in PyTorch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.storage.manifest import Quantization
from adalink.tools.parity.reference.gguf_weights import GgufWeights
from adalink.tools.parity.reference.quantized_weights import is_linear, weight_of
from adalink.tools.parity.reference.rounding import rounded_blocks
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    import torch

# Weights of a block of activations, by the type that they are multiplied with: llama.cpp's Q8_0 and Q8_K.
_SMALL_BLOCK, _LARGE_BLOCK = 32, 256
_SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")


@dataclass(frozen=True)
class FileLayer:
    """A linear layer of the model, and the type of its matrix in the file."""

    name: str
    module: Any
    type: str

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """See ``RoundedProduct``: what llama.cpp multiplies a matrix of this type with."""
        import torch

        if self.type == "F32":
            return x
        if self.type in ("F16", "BF16"):
            return x.to(torch.float16 if self.type == "F16" else torch.bfloat16).to(x.dtype)
        return rounded_blocks(x, _SMALL_BLOCK if self.type in _SMALL else _LARGE_BLOCK)


def file_layers(model: Any, path: Path, quantization: Quantization) -> tuple[list[FileLayer], list[Check]]:
    """The linear layers of a model, and checks that their weights are those of a GGUF file.

    Args:
        model: the model in PyTorch.
        path: the deployed file.
        quantization: what the manifest says of it.
    """
    weights, wrong, layers = GgufWeights(path), Counter[str](), []
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        tensor, weight = weights.tensor_of(name), weight_of(module)
        if tensor is None:
            wrong[name] += math.prod(weight.shape)
            continue
        expected = weights.values_of(tensor)
        is_same = expected.shape == tuple(weight.shape)
        wrong[name] += int((expected != weight.numpy()).sum()) if is_same else math.prod(weight.shape)
        layers.append(FileLayer(name, module, weights.type_of(tensor)))
    said = {kind.type: kind.tensors for kind in quantization.gguf}
    apart = Counter(said)
    apart.subtract(weights.types)
    strangers = [name for name, count in wrong.items() if count]
    return layers, [
        at_most(
            "quantization/gguf",
            sum(wrong.values()),
            0,
            f"weights of {len(wrong)} layers that are not the file's; in: {strangers or 'none'}",
        ),
        at_most(
            "quantization/record",
            sum(abs(count) for count in apart.values()),
            0,
            "matrices of the file of another type than the manifest says",
        ),
    ]
