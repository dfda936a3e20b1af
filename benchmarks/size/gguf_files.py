"""GGUF files as llama.cpp's quantiser writes them.

python -m benchmarks.size.gguf_files --model GGUF-OR-FOLDER --out FILE --type Q4_K_M

The prebuilt library has llama.cpp's coder of blocks, but not its program. So the types of tensors are chosen here, by
the same rule: for models of the Llama family with a tied head, without an importance matrix.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from adalink.runtime.llama_cpp.library import open_library

Kind = gguf.GGMLQuantizationType
# Of each file type, what most matrices have.
TYPES = {"Q4_0": Kind.Q4_0, "Q4_K_M": Kind.Q4_K, "Q8_0": Kind.Q8_0}
# In place of types with blocks of 256, where these do not divide a row.
_FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}
_TABLE = "token_embd.weight"


def type_of(name: str, shape: tuple[int, ...], file_type: str, layers: int) -> Any:
    """The type of a tensor, by llama.cpp's name.

    Args:
        name: name of the tensor in the file.
        shape: its shape, rows first.
        file_type: of ``TYPES``.
        layers: layers of the model.
    """
    if len(shape) < 2:
        return Kind.F32
    kind = TYPES[file_type]
    if name == _TABLE and file_type != "Q8_0":  # the head too
        kind = Kind.Q6_K
    elif file_type == "Q4_K_M" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        kind = Kind.Q6_K if _is_sensitive(int(name.split(".")[1]), layers) else kind
    return _FALLBACKS.get(kind, kind) if shape[-1] % 256 else kind


def _is_sensitive(layer: int, layers: int) -> bool:
    """An eighth at each end, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@dataclass(frozen=True)
class Tensor:
    """A tensor under its name in a GGUF file; ``read`` gives its float32 values."""

    name: str
    shape: tuple[int, ...]
    read: Any


def write_file(model: Path, out: Path, file_type: str) -> None:
    """Write a GGUF file of a checkpoint, one tensor at a time; an interrupted one leaves nothing under its name."""
    writer = gguf.GGUFWriter(out.with_name(f".{out.name}"), "llama")
    tensors, layers = (_of_file if model.is_file() else _of_folder)(model, writer)
    kinds = {tensor.name: type_of(tensor.name, tensor.shape, file_type, layers) for tensor in tensors}
    for tensor in tensors:
        shape = (*tensor.shape[:-1], _row_bytes(kinds[tensor.name], tensor.shape[-1]))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), kinds[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_stored(tensor, kinds[tensor.name]))
    writer.close()
    out.with_name(f".{out.name}").rename(out)


def _row_bytes(kind: Any, columns: int) -> int:
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return int(columns // numbers * size)


def _stored(tensor: Tensor, kind: Any) -> npt.NDArray[np.uint8]:
    values = np.ascontiguousarray(tensor.read(), np.float32)
    if kind == Kind.F32:
        return values.view(np.uint8)
    return quantize(values, int(kind), _row_bytes(kind, values.shape[-1]))


def quantize(values: npt.NDArray[np.float32], kind: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Blocks of a matrix, ``(rows, row_bytes)``, in one of ggml's types, by llama.cpp's own coder."""
    rows, columns = values.shape
    blocks = np.zeros((rows, row_bytes), np.uint8)
    data = np.ascontiguousarray(values).ctypes.data
    written = open_library().ggml_quantize_chunk(kind, data, blocks.ctypes.data, 0, rows, columns, None)
    if written != blocks.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of type {kind}, expected {blocks.nbytes}")
    return blocks


def _of_file(path: Path, writer: Any) -> tuple[list[Tensor], int]:
    """Tensors of a GGUF file, whose metadata the writer gets, and how many layers it has."""
    reader = gguf.GGUFReader(path)
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            value_type, *inner = entry.types
            writer.add_key_value(key, entry.contents(), value_type, inner[-1] if inner else None)

    def values(tensor: Any) -> Any:
        return lambda: gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    tensors = [
        Tensor(tensor.name, tuple(int(n) for n in reversed(tensor.shape)), values(tensor)) for tensor in reader.tensors
    ]
    return tensors, int(reader.fields["llama.block_count"].contents())


def _of_folder(folder: Path, writer: Any) -> tuple[list[Tensor], int]:
    """Tensors of a Hugging Face folder of the Llama family, without a vocabulary, and how many layers it has."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer.add_block_count(layers)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    permuted = {"q_proj": heads, "k_proj": config["num_key_value_heads"]}
    tensors = [
        Tensor(
            f"{names.get_name(name.removesuffix('.weight'))}.weight",
            shape,
            lambda path=path, name=name: _read(path, name, permuted.get(name.split(".")[-2], 0)),
        )
        for name, shape, path in _folder_tensors(folder)
    ]
    return tensors, layers


def _folder_tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Path]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                yield name, tuple(file.get_slice(name).get_shape()), path


def _read(path: Path, name: str, heads: int) -> npt.NDArray[np.float32]:
    """Values of a tensor; rows of queries and keys in llama.cpp's order, which pairs neighbours for the rotation."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        values: npt.NDArray[np.float32] = file.get_tensor(name).float().numpy()
    if heads:
        rows, columns = values.shape
        values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--type", choices=TYPES, required=True)
    arguments = parser.parse_args()
    write_file(arguments.model, arguments.out, arguments.type)
