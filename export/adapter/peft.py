"""PEFT adapter folders: methods that act on the input, or on the initial KV cache, become adapters of this kit.

The format is that of PEFT 0.21. A folder that PEFT wrote holds the name of its base, not a fingerprint, so the caller
vouches for the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np

from adalink.export.architectures import embedding_scale
from adalink.runtime.errors import AdapterError, ConfigError, ContractError
from adalink.runtime.storage.adapter import (
    CONFIG_FILE,
    SOFT_PROMPT_NAME,
    TABLE_NAME,
    Adapter,
    AdapterConfig,
    Weights,
    decode_tensors,
    make_adapter,
    read_method,
)
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.digest import fingerprint_embeddings
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME, KvPrefixSpec
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.mmap import Bytes
from adalink.runtime.storage.safetensors import raw_tensors, read_metadata

# Of the texts beside the tensors: which base a folder is for, where this kit has written it.
FINGERPRINT_KEY = "adalink_base_fingerprint"
_ACCEPTED = "PROMPT_TUNING, P_TUNING, CPT, PREFIX_TUNING, CARTRIDGE, and LORA of the input embedding alone"
# Why a method cannot be served from the input and the initial KV cache.
_REASONS = {
    "ADAPTION_PROMPT": "it adds prompts to the attention of inner layers",
    "MULTITASK_PROMPT_TUNING": "its prompt depends on a number given with each call",
    "IA3": "it scales activations inside every layer",
    "LN_TUNING": "it changes the norms inside the engine",
    "TRAINABLE_TOKENS": "it replaces rows of the embedding matrix, which a tied head shares",
    "ADALORA": "it changes weights inside the engine",
    "LOHA": "it changes weights inside the engine",
    "LOKR": "it changes weights inside the engine",
    "OFT": "it changes weights inside the engine",
    "BOFT": "it changes weights inside the engine",
    "VERA": "it changes weights inside the engine",
}
# Fields that may have any value: they do not change what is computed from the tensors.
_NEUTRAL = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    "inference_mode",
}
_PROMPT_NEUTRAL = _NEUTRAL | {
    *("num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"),
    *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"),
}
# Of CPT, what its loss and its training ask of the prompt's tokens: the vectors stand before the text like any other.
_CPT_NEUTRAL = _PROMPT_NEUTRAL | {
    *("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor"),
    *("opt_projection_epsilon", "opt_projection_format_epsilon"),
}
_KV_PREFIX_NEUTRAL = _PROMPT_NEUTRAL | {"prefix_projection", "init_weights", "num_frozen_tokens"}
_LORA_NEUTRAL = _NEUTRAL | {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
    *("eva_config", "loftq_config"),
}
# Initializations of LoRA that leave the base's weights as they are.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


def convert_peft(config_bytes: bytes, weights_bytes: Bytes, base: Base, origin: str, *, assume_base: bool) -> Adapter:
    """Convert an adapter that PEFT wrote.

    Args:
        config_bytes: its ``adapter_config.json``.
        weights_bytes: its ``adapter_model.safetensors``.
        base: the contract of the deployment that it is for.
        origin: what to call it in errors.
        assume_base: accept it as trained for this base.

    Raises:
        AdapterError: the method acts on more than that, or the folder does not fit its method.
        ContractError: its width, vocabulary or KV cache is another base's, or nobody vouches for the base.
    """
    peft_type, fields = read_method(config_bytes, origin), _read_fields(config_bytes, origin)
    readers: dict[str, Callable[[_Folder], tuple[dict[str, Any], Weights]]] = {
        "PROMPT_TUNING": _soft_prompt,
        "P_TUNING": _soft_prompt,
        "CPT": partial(_soft_prompt, neutral=_CPT_NEUTRAL),
        "PREFIX_TUNING": _kv_prefix,
        "CARTRIDGE": _kv_prefix,
        "LORA": _lora,
    }
    if peft_type not in readers:
        reason = _REASONS.get(peft_type, "this kit knows no way to serve it from the input")
        raise AdapterError(f"{origin}: {peft_type} cannot be exported: {reason}; of PEFT's methods {_ACCEPTED} can")
    folder = _Folder(origin, fields, decode_tensors(weights_bytes, origin), base)
    folder.halves = {name for name, tensor in raw_tensors(weights_bytes).items() if tensor.dtype == np.float16}
    _check_fingerprint(folder, read_metadata(weights_bytes))
    settings, weights = readers[peft_type](folder)
    if not (assume_base or folder.shows_base):
        raise ContractError(
            f"{origin}: a {peft_type} folder does not say which weights it was trained for (it names "
            f"{fields.get('base_model_name_or_path')!r}), and the deployment holds {base.name} ({base.fingerprint}): "
            "if you know that it was trained for this very base, say so with --assume-base"
        )
    try:
        config = AdapterConfig(
            base_model_name_or_path=base.name,
            base_fingerprint=base.fingerprint,
            hidden_size=base.hidden_size,
            activation="identity",
            bias=False,
            modalities=("text",),
            scope="all",
            **settings,
        )
    except ConfigError as error:
        raise AdapterError(f"{origin}: {error}") from error
    return make_adapter(config, weights, origin)


def _read_fields(config_bytes: bytes, origin: str) -> dict[str, Any]:
    """All fields of ``adapter_config.json``; raises ``AdapterError``."""
    try:
        return decode_json(config_bytes, dict[str, Any])
    except msgspec.DecodeError as error:  # a number beyond float64 in a field that the method's name does not need
        raise AdapterError(f"{origin}: {CONFIG_FILE}: {error}") from error


class _Folder:
    """A PEFT folder that is being read.

    Attributes:
        origin: what to call it in errors.
        fields: of its config.
        tensors: its weights, float32 by name.
        base: the contract of the deployment.
        shows_base: whether it holds the base's fingerprint, or its embedding matrix.
        halves: names of the tensors that it holds in float16.
    """

    def __init__(self, origin: str, fields: Mapping[str, Any], tensors: Weights, base: Base) -> None:
        self.origin, self.fields, self.tensors, self.base = origin, fields, tensors, base
        self.shows_base = False
        self.halves: set[str] = set()

    def number(self, name: str) -> float:
        """A positive number of the config; raises ``AdapterError``."""
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise AdapterError(f"{self.origin}: {name} is {value!r} in {CONFIG_FILE}, expected a positive number")
        return value

    def demand_neutral(self, known: set[str]) -> None:
        """Refuse unknown fields that may change what is computed; raises ``AdapterError``."""
        for name, value in self.fields.items():
            if name not in known and value not in (None, False, "none", [], {}):
                raise AdapterError(
                    f"{self.origin}: {name} is {value!r} in {CONFIG_FILE}, which cannot be exported: it trains or "
                    f"computes more than an engine's input; train without it ({_ACCEPTED} can be exported)"
                )

    def demand_shape(self, name: str, shape: tuple[int, int], what: str) -> Any:
        """The tensor ``name``, which must have that shape to fit the base; raises ``ContractError``."""
        if self.tensors[name].shape != shape:
            raise ContractError(
                f"{self.origin}: tensor {name!r} has shape {self.tensors[name].shape}, {self.base.name} asks for "
                f"{shape} ({what}): it was trained for another base"
            )
        return self.tensors[name]


def _check_fingerprint(folder: _Folder, metadata: Mapping[str, str]) -> None:
    """Compare the base's fingerprint that `adalink.export.lora` writes with the base; raises ``ContractError``."""
    fingerprint = metadata.get(FINGERPRINT_KEY)
    if fingerprint not in (None, folder.base.fingerprint):
        raise ContractError(
            f"{folder.origin} was made for the base {fingerprint}, {folder.base.name} is {folder.base.fingerprint}: "
            "it belongs to another base"
        )
    folder.shows_base = fingerprint is not None


def _soft_prompt(folder: _Folder, neutral: set[str] = _PROMPT_NEUTRAL) -> tuple[dict[str, Any], Weights]:
    """Prompt tuning, P-tuning and CPT: PEFT saves the vectors that its encoder computed.

    It prepends them as they are: a model that scales its embeddings does not scale these.
    """
    folder.demand_neutral(neutral)
    count = _check_prompt_embeddings(folder)
    what = f"num_virtual_tokens {count}, hidden_size {folder.base.hidden_size}"
    vectors = folder.demand_shape("prompt_embeddings", (count, folder.base.hidden_size), what)
    return {"rank": 0, "soft_tokens": count}, {SOFT_PROMPT_NAME: vectors}


def _check_prompt_embeddings(folder: _Folder) -> int:
    """Check that a folder holds one prompt and nothing else; returns its number of tokens."""
    submodules = folder.fields.get("num_transformer_submodules")
    if submodules not in (1, None):
        raise AdapterError(
            f"{folder.origin}: num_transformer_submodules is {submodules}: its second prompt is for the decoder of an "
            "encoder-decoder, which this engine gives no task; train with num_transformer_submodules=1"
        )
    if folder.tensors.keys() != {"prompt_embeddings"}:
        raise AdapterError(
            f"{folder.origin}: it holds {sorted(folder.tensors)}, expected 'prompt_embeddings' alone: what was trained "
            "beside the prompt is no part of an engine's input"
        )
    return int(folder.number("num_virtual_tokens"))


def _kv_prefix(folder: _Folder) -> tuple[dict[str, Any], Weights]:
    """Prefix tuning, with a projection or without, and cartridges: PEFT saves the keys and values of each token.

    A row holds, for each layer, its key and then its value, head after head.
    """
    origin, base = folder.origin, folder.base
    folder.demand_neutral(_KV_PREFIX_NEUTRAL)
    if base.no_kv_prefix or base.cache is None:
        raise ContractError(f"{origin} is a KV prefix, and {base.name} takes none: {base.no_kv_prefix}")
    count, cache = _check_prompt_embeddings(folder), base.cache
    expected = {
        "num_layers": cache.layers,
        "num_attention_heads": cache.kv_heads,
        "token_dim": cache.kv_heads * cache.head_dim,
    }
    # As many numbers a token may be other heads: PEFT's own fields say which.
    for name, value in expected.items():
        if folder.fields.get(name) != value:
            raise ContractError(
                f"{origin}: {name} is {folder.fields.get(name)!r}, the KV cache of {base.name} asks for {value} "
                f"({cache.layers} layers, {cache.kv_heads} heads of {cache.head_dim}): it was trained for another base"
            )
    what = f"num_virtual_tokens {count}, 2 * {cache.layers} layers * token_dim {expected['token_dim']}"
    rows = folder.demand_shape("prompt_embeddings", (count, 2 * cache.layers * expected["token_dim"]), what)
    states = rows.reshape(count, cache.layers, 2, cache.kv_heads, cache.head_dim).transpose(1, 2, 3, 0, 4)
    dtype = "float16" if "prompt_embeddings" in folder.halves else "float32"
    return {"rank": 0, "kv_prefix": KvPrefixSpec(tokens=count, dtype=dtype)}, {KV_PREFIX_NAME: states}


def _lora(folder: _Folder) -> tuple[dict[str, Any], Weights]:
    """LoRA of the input embedding alone: ``x + scaling * B @ A[:, id]``."""
    origin, base = folder.origin, folder.base
    folder.demand_neutral(_LORA_NEUTRAL)
    for name in sorted(folder.tensors):
        module, _, part = name.rpartition(".")
        where = module.rpartition(".")[2]
        is_lora = part in ("lora_embedding_A", "lora_embedding_B") and where in _INPUT_EMBEDDINGS
        # PEFT saves the matrix of an embedding beside its LoRA.
        is_matrix = part == "weight" and module.rpartition(".")[0].rpartition(".")[2] in _INPUT_EMBEDDINGS
        if not (is_lora or (is_matrix and where == "base_layer")):
            raise AdapterError(
                f"{origin}: tensor {name!r} changes weights inside the engine, which stays as it was compiled and "
                "takes nothing but its input: LoRA of the input embedding alone can be exported (target_modules one of "
                f"{', '.join(_INPUT_EMBEDDINGS)}); merge other LoRA into the checkpoint and export that as its own base"
            )
    if (init := folder.fields.get("init_lora_weights", True)) not in _INITIALIZATIONS:
        raise AdapterError(
            f"{origin}: init_lora_weights is {init!r}, which changes the base's own weights: train with one of "
            f"{', '.join(map(str, _INITIALIZATIONS))}"
        )
    if base.kind == "encoder-decoder":
        raise ContractError(
            f"{origin}: the embedding of {base.name} serves its decoder too, whose tokens no task adapts: "
            "LoRA of it cannot be exported"
        )
    names = {name.rpartition(".")[2]: name for name in folder.tensors if not name.endswith(".base_layer.weight")}
    if len(names) != 2 or len({name.rpartition(".")[0] for name in names.values()}) != 1:
        raise AdapterError(
            f"{origin}: it holds {sorted(folder.tensors)}, expected lora_embedding_A and B of one module"
        )
    rank = int(folder.number("r"))
    what = f"r {rank}, vocabulary {base.vocab_size}, hidden_size {base.hidden_size}"
    first = folder.demand_shape(names["lora_embedding_A"], (rank, base.vocab_size), what)
    second = folder.demand_shape(names["lora_embedding_B"], (base.hidden_size, rank), what)
    _check_matrix(folder)
    scaling = folder.number("lora_alpha") / (math.sqrt(rank) if folder.fields.get("use_rslora") else rank)
    scaling *= embedding_scale(base.architecture, base.hidden_size)  # PEFT adds to the row before it is scaled
    weights = {
        TABLE_NAME: np.ascontiguousarray(first.T),
        "text.up.weight": (second.astype(np.float64) * scaling).astype(np.float32),
    }
    return {"rank": rank, "input": "ids"}, weights


def _check_matrix(folder: _Folder) -> None:
    """Compare an embedding matrix in the folder with the base's by fingerprint; a match shows which base this is."""
    for name, matrix in folder.tensors.items():
        if name.endswith(".base_layer.weight"):
            if (fingerprint := fingerprint_embeddings(matrix)) != folder.base.fingerprint:
                raise ContractError(
                    f"{folder.origin}: the embedding matrix beside its LoRA ({name}) has fingerprint {fingerprint}, "
                    f"{folder.base.name} has {folder.base.fingerprint}: it was trained for another base, or resized it"
                )
            folder.shows_base = True
