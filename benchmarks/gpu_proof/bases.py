"""Seeded bases in Llama's form, written as safetensors: nothing large has to travel, and nothing is trained.

A weight is a random sign and mantissa beside one exponent for the tensor. So a billion of them take seconds, and each
is the same number in bfloat16, float16 and float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.process import REPOSITORY

# The root mean square of a number drawn evenly from [1, 2).
_MANTISSA_RMS = math.sqrt(7 / 3)
_SIGN_AND_MANTISSA, _MANTISSA, _ONE_HALF = 0x807F, 0x007F, 126
_BIAS, _MANTISSA_BITS = 127, 7
_TABLE_SCALE, _MATRIX_SCALE = 0.5, 1.2
_CHUNK = 1 << 24
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEXTS = ("README.md", "docs/guides/*.md", "docs/concepts/*.md", "docs/decisions/*.md")


@dataclass(frozen=True)
class Shape:
    """Sizes of a base of Llama's form.

    Attributes:
        hidden: width of the embeddings.
        inner: width of the feed-forward layers.
        layers: number of layers.
        heads: attention heads.
        kv_heads: heads of keys and values.
        vocabulary: number of tokens.
        positions: longest sequence.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the file."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        kv = self.kv_heads * self.head_dim
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", kv), ("v", kv)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)


SHAPES = {
    "tiny": Shape(64, 96, 2, 4, 2, 2048, 2048),
    # SmolLM2-135M.
    "135m": Shape(576, 1536, 30, 9, 3, 49152, 8192),
    # Llama-3.2-1B.
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 8192),
}


def write_base(folder: Path, shape: Shape, seed: int = 1) -> Path:
    """Write a checkpoint with its tokenizer; one that is there is used again.

    Args:
        folder: where to write; ``config.json`` comes last.
        shape: the sizes.
        seed: seed of the weights.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", shape, seed)
    write_tokenizer(folder, shape.vocabulary)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")
    return folder


def write_weights(path: Path, shape: Shape, seed: int) -> None:
    """Write the weights in bfloat16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in shape.tensors():
        start, end = end, end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, sizes in shape.tensors():
            keep, exponent = _SIGN_AND_MANTISSA, _exponent(name, sizes)
            if len(sizes) == 1:  # a norm's weights: from one half to one
                keep, exponent = _MANTISSA, _ONE_HALF
            left = math.prod(sizes)
            while left:
                bits = np.frombuffer(rng.bytes(2 * min(left, _CHUNK)), "<u2")
                stream.write(((bits & np.uint16(keep)) | np.uint16(exponent << _MANTISSA_BITS)).tobytes())
                left -= len(bits)


def _exponent(name: str, sizes: tuple[int, ...]) -> int:
    """The exponent with which a matrix keeps the size of what it is applied to."""
    scale = _TABLE_SCALE if "embed" in name else _MATRIX_SCALE * sizes[-1] ** -0.5
    return _BIAS + round(math.log2(scale / _MANTISSA_RMS))


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a byte-level tokenizer, trained on the repository's pages and filled up to ``vocabulary`` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text(encoding="utf-8") for pattern in _TEXTS for path in sorted(REPOSITORY.glob(pattern))]
    tokenizer.train_from_iterator(texts, trainer)
    written = json.loads(tokenizer.to_str())
    known = written["model"]["vocab"]
    known |= {f"<|unused_{number}|>": number for number in range(len(known), vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIALS[1],
        "eos_token": _SPECIALS[2],
    }
    settings |= {"pad_token": _SPECIALS[2], "model_max_length": 8192, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
