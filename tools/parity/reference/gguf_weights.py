"""Weights of a GGUF file, read with the ``gguf`` package and placed by name: the reference for codes that were kept.

The export finds its rows by value in the model that transformers loads. So here names and layouts are said again, and
the file is compared with both.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ContractError
from adalink.runtime.storage.manifest import GgufTensors, Quantization
from adalink.tools.parity.reference.quantized_weights import Layer, Matrix, check_matrices, check_weights
from adalink.tools.parity.report import Check, at_most
from adalink.training.models.gguf.header import read_header
from adalink.training.models.source import display_name, gguf_file

Float32 = npt.NDArray[np.float32]

# Types whose weights an engine has exactly as they are.
KEPT = ("Q4_0", "Q5_0", "Q8_0", "Q6_K")
_LAYER = re.compile(r"(?:(enc|dec)oder\.|\w+\.)?(?:layers|h|block)\.(\d+)\.(?:layer\.\d+\.)?(.+)")
# A layer's modules by the names of transformers, and what llama.cpp's converter calls them.
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # GPT-2
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    # T5
    **{f"SelfAttention.{part}": f"attn_{part}" for part in "qkvo"},
    **{f"EncDecAttention.{part}": f"cross_attn_{part}" for part in "qkvo"},
    "DenseReluDense.wi": "ffn_up",
    "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up",
    "DenseReluDense.wo": "ffn_down",
}
_HEAD, _EMBEDDINGS = "output.weight", "token_embd.weight"


class GgufWeights:
    """The matrices of a GGUF file by the names of transformers' modules."""

    def __init__(self, path: Path) -> None:
        """Open the file."""
        from gguf import GGUFReader

        header = read_header(path)
        self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        self._heads = {}
        if header.architecture == "llama":  # its converter stores the two halves of a head's rows in turn
            heads = header.metadata["llama.attention.head_count"]
            self._heads = {"attn_q": heads, "attn_k": header.metadata.get("llama.attention.head_count_kv", heads)}

    def tensor_of(self, module: str) -> str | None:
        """Name of the tensor of a module; ``None`` if the file has none."""
        if module == "lm_head":
            return _HEAD if _HEAD in self._tensors else _EMBEDDINGS
        match = _LAYER.fullmatch(module)
        if match is None or match[3] not in _NAMES:
            return None
        name = f"{match[1] + '.' if match[1] else ''}blk.{match[2]}.{_NAMES[match[3]]}.weight"
        return name if name in self._tensors else None

    @property
    def types(self) -> Counter[str]:
        """How many matrices there are of each type."""
        return Counter(str(tensor.tensor_type.name) for tensor in self._tensors.values() if len(tensor.shape) == 2)

    def type_of(self, tensor: str) -> str:
        """Type of a tensor, such as ``"Q4_0"``."""
        return str(self._tensors[tensor].tensor_type.name)

    def values_of(self, tensor: str) -> Float32:
        """A tensor in the layout of transformers' modules, shape ``(outputs, inputs)``."""
        from gguf.quants import dequantize

        entry = self._tensors[tensor]
        values: Float32 = np.asarray(dequantize(entry.data, entry.tensor_type), np.float32)
        heads = self._heads.get(tensor.split(".")[-2])
        if heads is None:
            return values
        return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def check_layers(
    layers: list[Layer], matrices: list[Matrix], quantization: Quantization, spec: str | Path
) -> list[Check]:
    """Check that matrices are a model's weights, quantised, or the codes of its file.

    Args:
        layers: the layers, each with its rows of a matrix.
        matrices: all of a graph's quantised matrices.
        quantization: what the manifest says of them.
        spec: the base that the model was loaded from.

    Raises:
        ContractError: they are codes of a GGUF file, and the model is not loaded from one.
    """
    checks = [check_matrices(layers, matrices)]
    if not quantization.gguf:
        return checks + check_weights(layers)
    path = gguf_file(spec)
    if path is None:
        raise ContractError(
            f"the variant keeps the codes of a GGUF file, and {display_name(spec)} is none: verify it against the "
            "file it was made from"
        )
    return checks + check_codes(GgufWeights(path), layers, quantization.gguf)


def check_codes(weights: GgufWeights, layers: list[Layer], recorded: tuple[GgufTensors, ...]) -> list[Check]:
    """Check the quantised layers of an engine that keeps the codes of a GGUF file.

    Args:
        weights: the file.
        layers: the layers, each with its rows of a matrix.
        recorded: what the manifest says of the file's tensors.

    Returns:
        Checks that kept weights are the file's, that the model has been loaded with the file's values, that the record
        is right, and, where others were quantised again, as of any quantised engine.
    """
    wrong: Counter[str] = Counter()
    again: list[Layer] = []
    outcomes: dict[str, tuple[str, int, int, bool]] = {}
    for layer in layers:
        tensor = weights.tensor_of(layer.name)
        if tensor is None:
            wrong[layer.name] += math.prod(layer.shape)
            continue
        is_kept = weights.type_of(tensor) in KEPT
        wrong[layer.name] += _differing(weights.values_of(tensor), layer, is_kept)
        again += [] if is_kept else [layer]
        outcomes[tensor] = (weights.type_of(tensor), layer.matrix.bits, layer.matrix.block_size, is_kept)
    said = Counter({(e.type, e.bits, e.block_size, e.is_exact): e.tensors for e in recorded if e.block_size})
    seen = Counter(outcomes.values())
    strangers = [name for name, count in wrong.items() if count]
    return [
        at_most(
            "quantization/gguf",
            sum(wrong.values()),
            0,
            f"weights of {len(layers)} layers, {len(again)} of them quantised again, that are not the file's; "
            f"in: {strangers or 'none'}",
        ),
        at_most(
            "quantization/record",
            ((said - seen) + (seen - said)).total(),
            0,
            "tensors of the file with another type, bits or blocks than the manifest says",
        ),
        *(check_weights(again) if again else []),
    ]


def _differing(expected: Float32, layer: Layer, is_kept: bool) -> int:
    """How many weights of the model, and of the engine if it keeps them, are not the file's; all, if shapes differ."""
    if expected.shape != layer.shape:
        return math.prod(layer.shape)
    count, first = 0, layer.rows.start
    for rows, engine, model in layer.pairs():
        right = expected[rows.start - first : rows.stop - first]
        count += sum(int((right != values.numpy()).sum()) for values in ([model, engine] if is_kept else [model]))
    return count
