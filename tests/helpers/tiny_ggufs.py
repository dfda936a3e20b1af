"""Tiny GGUF files of the tiny models, written with the ``gguf`` package as llama.cpp's converter writes them.

The names and the layout of weights are said here again, so that nothing of what reads the files helps to write them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from helpers import tiny_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Metadata = dict[str, Any]
Tensors = "dict[str, npt.NDArray[np.float32]]"

# A byte-level vocabulary of 96 tokens: "Ġ" is the space, "Ċ" the line end, and three merges reach over a boundary.
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")
MERGES = ("Ġ 1", "1 2", "Ċ Ċ", "Ċ Ġ", "a b", "ab a", "Ġ a")
_BYTES = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", "Ċ"]
_LEFT_OUT = set("^`{}~|\\@&;%#$") | {"["}


def tokens() -> list[str]:
    """The vocabulary, of as many tokens as the tiny models have."""
    merged = [merge.replace(" ", "") for merge in MERGES]
    kept = [token for token in _BYTES if token not in _LEFT_OUT]
    known = [*SPECIALS, *kept, *merged]
    return known + [f"<|unused{index}|>" for index in range(tiny_models.VOCAB_SIZE - len(known))]


def tokenizer_metadata(pre: str = "gpt-2") -> Metadata:
    """Keys of a byte-level tokenizer."""
    from gguf import TokenType

    vocabulary = tokens()
    kinds = [TokenType.CONTROL if token.startswith("<|") else TokenType.NORMAL for token in vocabulary]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def write_gguf(path: Path, model: PreTrainedModel, architecture: str, **changes: Any) -> Path:
    """Write a tiny model as a GGUF file.

    Args:
        path: the file.
        model: one of ``tiny_models``.
        architecture: its GGUF architecture.
        changes: ``metadata`` and ``tensors`` to add or replace (``None`` leaves one out), ``pre``, and ``kind``, from
            a matrix's name to its ggml type.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    metadata = {**_sizes(model, architecture), **tokenizer_metadata(changes.get("pre", "gpt-2"))}
    tensors = _tensors(model, architecture)
    metadata |= changes.get("metadata", {})
    tensors |= changes.get("tensors", {})
    kind_of = changes.get("kind", lambda name: "F32")
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, values in tensors.items():
        if values is None:
            continue
        values = np.ascontiguousarray(values, dtype=np.float32)
        kind = GGMLQuantizationType[kind_of(name) if values.ndim == 2 else "F32"]
        writer.add_tensor(name, _quantized(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wide(architecture: str) -> PreTrainedModel:
    """A tiny model whose rows are whole blocks: of 32 weights, and those of ``ffn_down`` of 256 where it can be."""
    model = getattr(tiny_models, architecture)()
    config = model.config
    sizes = {"hidden_size": 64, "intermediate_size": 256}
    if architecture == "gpt2":
        sizes = {"n_embd": 64, "n_head": 4}
    elif architecture == "t5":
        sizes = {"d_model": 64, "d_ff": 256, "d_kv": 16}
    for name, value in sizes.items():
        setattr(config, name, value)
    return tiny_models._fill(type(model)(config), 1)


def _quantized(values: Any, kind: Any) -> Any:
    """Values in a type of ggml; in one that the ``gguf`` package cannot write, random blocks of like size."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import quantize

    if not kind.name.endswith("_K"):
        return quantize(values, kind)
    group, size = GGML_QUANT_SIZES[kind]
    seed = int(values.view(np.uint32).sum())  # no two matrices are equal
    blocks = np.random.default_rng(seed).integers(0, 256, (values.size // group, size), np.uint8)
    scale = np.array([1e-4 if kind.name == "Q6_K" else 3e-3], "<f2").view(np.uint8)
    # The scale is at a block's end, or at its beginning, with that of the minima.
    blocks[:, -2:] = scale if kind.name == "Q6_K" else blocks[:, -2:]
    blocks[:, :4] = blocks[:, :4] if kind.name == "Q6_K" else np.tile(scale, 2)
    return blocks.reshape(len(values), -1)


def _add(writer: Any, key: str, value: Any) -> None:
    add: Mapping[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _sizes(model: PreTrainedModel, architecture: str) -> Metadata:
    config = model.config
    keys: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 512),
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", getattr(config, "d_ff", 4 * config.hidden_size)),
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "t5":
        keys |= {
            "decoder_block_count": config.num_decoder_layers,
            "attention.key_length": config.d_kv,
            "attention.value_length": config.d_kv,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
            "attention.relative_buckets_count": config.relative_attention_num_buckets,
            "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
            "decoder_start_token_id": config.decoder_start_token_id,
        }
    elif architecture == "gpt2":
        keys["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    else:
        ropes = config.rope_parameters
        keys |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.freq_base": float(ropes.get("full_attention", ropes)["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        if hasattr(config, "head_dim"):
            keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
        if architecture in ("llama", "phi3"):
            keys["rope.dimension_count"] = config.head_dim
        if architecture == "gemma3":
            keys["attention.sliding_window"] = config.sliding_window
            keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    return {f"{architecture}.{key}": value for key, value in keys.items()}


_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    # GPT-2
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_GEMMA3 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


# T5: the parts of an encoder's layer, and what a decoder has between them.
_T5 = {
    "SelfAttention": "attn",
    "EncDecAttention": "cross_attn",
    "relative_attention_bias": "rel_b",
    "wi": "ffn_up",
    "wi_0": "ffn_gate",
    "wi_1": "ffn_up",
    "wo": "ffn_down",
}


def _t5_name(stem: str) -> str:
    """GGUF name of a tensor of T5."""
    if stem in ("shared", "lm_head"):
        return {"shared": "token_embd", "lm_head": "output"}[stem]
    stack, *rest = stem.split(".")
    short = stack[:3]
    if rest == ["final_layer_norm"]:
        return f"{short}.output_norm"
    _, layer, _, place, *part = rest
    if part == ["layer_norm"]:
        norms = ("attn_norm", "ffn_norm") if short == "enc" else ("attn_norm", "cross_attn_norm", "ffn_norm")
        return f"{short}.blk.{layer}.{norms[int(place)]}"
    kind, name = part
    known = _T5[name] if kind == "DenseReluDense" else f"{_T5[kind]}_{_T5.get(name, name)}"
    return f"{short}.blk.{layer}.{known}"


def _tensors(model: PreTrainedModel, architecture: str) -> Any:
    config = model.config
    if architecture == "t5":
        parameters = dict(model.named_parameters())  # each shared matrix once
        return {
            f"{_t5_name(name.removesuffix('.weight'))}.weight": values.detach().float().numpy()
            for name, values in parameters.items()
        }
    names = {**_LAYER, **(_GEMMA3 if architecture == "gemma3" else {})}
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name.startswith("lm_head") and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        if stem in _OUTSIDE:
            known = _OUTSIDE[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            known = f"blk.{layer}.{names[rest]}"
        tensors[f"{known}.{ending}"] = _converted(parameter.float().numpy(), known, ending, architecture, config)
    return tensors


def _converted(values: Any, known: str, ending: str, architecture: str, config: Any) -> Any:
    """Values as llama.cpp's converter stores them."""
    if architecture == "llama" and known.endswith((".attn_q", ".attn_k")):
        heads = config.num_attention_heads if known.endswith("_q") else config.num_key_value_heads
        return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if architecture == "gemma3" and known.endswith("norm"):
        return values + 1
    is_matrix = known.endswith(("attn_qkv", "attn_output", "ffn_up", "ffn_down"))
    return values.T if architecture == "gpt2" and is_matrix and ending == "weight" else values
