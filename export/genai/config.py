"""``genai_config.json`` and ``tokenizer_config.json`` of an onnxruntime-genai folder."""

from __future__ import annotations

import json

from adalink.export.genai.graphs import SCORES
from adalink.export.genai.place import HEAD
from adalink.export.pipeline.stages import FRONT
from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.manifest import Base

# Settings that onnxruntime-genai has under the same names, with the same meaning.
_SEARCH = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
)
# Read in pieces of so many tokens, since the logits of each position have their place in memory.
_CHUNK = 256
_PAST, _PRESENT = "past_key_values.%d.{}", "present.%d.{}"

Stage = dict[str, object]


def genai_config(base: Base, graph: str, task_inputs: tuple[str, ...], base_inputs: tuple[str, ...]) -> bytes:
    """The config of a pipeline of three graphs: tokens to adapted embeddings, the base, and the shape of its logits.

    Args:
        base: the contract.
        graph: file name of the base's graph.
        task_inputs: inputs that a task gives.
        base_inputs: inputs of the base's graph without the cache.
    """
    cache = base.cache
    assert cache is not None
    names = {kind: [_PAST.format(kind), _PRESENT.format(kind)] for kind in ("key", "value")}
    layers = [(index, kind) for index in range(cache.layers) for kind in names]
    past, present = ([names[kind][place].replace("%d", str(index)) for index, kind in layers] for place in (0, 1))
    stages: list[dict[str, Stage]] = [
        {"front": _stage(FRONT, ["input_ids", "attention_mask", *task_inputs], list(base_inputs))},
        {"base": _stage(graph, [*base_inputs, *past], ["logits", *present])},
        {"head": _stage(HEAD, ["logits", "input_ids"], [SCORES])},
    ]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": base.hidden_size,
        "head_size": cache.head_dim,
        "num_hidden_layers": cache.layers,
        "num_key_value_heads": cache.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": names["key"][0],
            "past_value_names": names["value"][0],
        },
        "outputs": {"logits": SCORES, "present_key_names": names["key"][1], "present_value_names": names["value"][1]},
        "pipeline": stages,
    }
    length = base.max_positions
    if length is None:
        raise ConfigError(f"base {base.name} has no longest sequence, and onnxruntime-genai makes room for one")
    model: dict[str, object] = {
        "type": "decoder-pipeline",
        "vocab_size": base.vocab_size,
        "context_length": length,
        "eos_token_id": list(base.eos_token_ids),
        "pad_token_id": base.pad_token_id,
        "decoder": decoder,
    }
    if base.bos_token_id is not None:
        model["bos_token_id"] = base.bos_token_id
    search = {"max_length": length, "past_present_share_buffer": True, "num_beams": 1, "chunk_size": _CHUNK}
    return _encode({"model": model, "search": {**search, **_defaults(base)}})


def not_carried(generation: GenerationDefaults | None) -> dict[str, object]:
    """Generation defaults that the config cannot say; a caller has to apply them."""
    applied = {} if generation is None else generation.applied()
    return {name: value for name, value in applied.items() if name not in _SEARCH}


def tokenizer_config(base: Base, chat_template: str | None) -> bytes:
    """What onnxruntime-genai reads beside ``tokenizer.json``."""
    fields: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **(base.special_tokens or {})}
    if chat_template is not None:
        fields["chat_template"] = chat_template
    return _encode(fields)


def _stage(filename: str, inputs: list[str], outputs: list[str]) -> Stage:
    return {"filename": filename, "inputs": inputs, "outputs": outputs}


def _defaults(base: Base) -> dict[str, object]:
    """How tokens are chosen; where the host's own default differs, what the checkpoint says is written out."""
    generation = base.generation
    if generation is None:
        return {"do_sample": False}
    values = {name: getattr(generation, name) for name in _SEARCH}
    given = {name: value for name, value in values.items() if value is not None}
    if generation.do_sample or generation.top_k == 0:  # the host keeps 50 tokens where no number is given
        given["top_k"] = generation.top_k or base.vocab_size
    return {**given, "do_sample": generation.do_sample and generation.temperature != 0}


def _encode(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
