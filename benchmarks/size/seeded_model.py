"""A checkpoint of N billion seeded parameters, in shards: ``python -m benchmarks.size.seeded_model FOLDER --size 3b``.

Weights are noise of the width that training begins with. Shards are written one matrix at a time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Sizes of real models: Gemma-3-270M, Qwen2.5-0.5B, Llama-3.2-1B, Qwen2.5-3B; `matrix` has one layer, and one matrix
# above 2 GiB.
SIZES = {
    "0.27b": {"hidden": 640, "layers": 18, "inner": 2048, "heads": 10, "kv_heads": 2, "vocabulary": 262144},
    "0.5b": {"hidden": 896, "layers": 24, "inner": 4864, "heads": 14, "kv_heads": 2, "vocabulary": 151936},
    "1b": {"hidden": 2048, "layers": 16, "inner": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "3b": {"hidden": 2048, "layers": 36, "inner": 11008, "heads": 16, "kv_heads": 2, "vocabulary": 151936},
    "matrix": {"hidden": 2560, "layers": 1, "inner": 512, "heads": 20, "kv_heads": 4, "vocabulary": 262144},
}
SHARD_BYTES = 2 << 30
_PIECE = 1 << 24
_DEVIATION = 0.02
_CODES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}


def config_of(size: str, dtype: str) -> dict[str, object]:
    """``config.json`` of a model of the Llama family."""
    numbers = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": numbers["hidden"],
        "intermediate_size": numbers["inner"],
        "num_hidden_layers": numbers["layers"],
        "num_attention_heads": numbers["heads"],
        "num_key_value_heads": numbers["kv_heads"],
        "vocab_size": numbers["vocabulary"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
    }


def tensors_of(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights; the head is tied to the embeddings."""
    n = SIZES[size]
    width = n["hidden"] // n["heads"] * n["kv_heads"]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n["vocabulary"], n["hidden"])}
    for layer in range(n["layers"]):
        stem = f"model.layers.{layer}"
        for name, rows in (("q", n["hidden"]), ("k", width), ("v", width)):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = (rows, n["hidden"])
        tensors[f"{stem}.self_attn.o_proj.weight"] = (n["hidden"], n["hidden"])
        tensors[f"{stem}.mlp.gate_proj.weight"] = (n["inner"], n["hidden"])
        tensors[f"{stem}.mlp.up_proj.weight"] = (n["inner"], n["hidden"])
        tensors[f"{stem}.mlp.down_proj.weight"] = (n["hidden"], n["inner"])
        tensors[f"{stem}.input_layernorm.weight"] = (n["hidden"],)
        tensors[f"{stem}.post_attention_layernorm.weight"] = (n["hidden"],)
    return tensors | {"model.norm.weight": (n["hidden"],)}


def parameters_of(size: str) -> int:
    """How many numbers a model has."""
    return sum(math.prod(shape) for shape in tensors_of(size).values())


def write_model(folder: Path, size: str, dtype: str = "bfloat16") -> Path:
    """Write a checkpoint of ``SIZES`` in ``dtype``, a Hugging Face folder without a tokenizer; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(size, dtype)))
    generator = np.random.default_rng(0)
    shards = _shards(tensors_of(size), _CODES[dtype][1])
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, dtype, generator)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _shards(tensors: dict[str, tuple[int, ...]], number_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        if shards[-1] and size + number_bytes * math.prod(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += number_bytes * math.prod(shape)
    return shards


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, generator: np.random.Generator) -> None:
    code, number_bytes = _CODES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + number_bytes * math.prod(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            for values in _values(shape, generator):
                bits = values.view(np.uint32)
                stream.write(values.data if dtype == "float32" else (bits >> 16).astype(np.uint16).data)


def _values(shape: tuple[int, ...], generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Ones for norms, noise for matrices, in pieces."""
    count = math.prod(shape)
    if len(shape) == 1:
        yield np.ones(count, np.float32)
        return
    for start in range(0, count, _PIECE):
        yield generator.standard_normal(min(_PIECE, count - start), np.float32) * np.float32(_DEVIATION)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=_CODES, default="bfloat16")
    arguments = parser.parse_args()
    write_model(arguments.folder, arguments.size, arguments.dtype)
    print(json.dumps({"folder": str(arguments.folder), "parameters": parameters_of(arguments.size)}))
