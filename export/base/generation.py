"""Generation defaults of a checkpoint: what of its generation config the runtime applies, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.generation_schema import GenerationDefaults, SequenceBias, range_fault, token_ids_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers takes for a sampling checkpoint that names no top_k.
_TOP_K = 50
_NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "min_length"),
    *("min_new_tokens", "max_new_tokens"),
)
_WHOLE = ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens", "max_new_tokens")
_APPLIED = frozenset(GenerationDefaults.__struct_fields__) | {"forced_eos_token_id"}
# They choose no token: outputs, caches and speed, ids that the base contract has, and what only beams use.
_HARMLESS = frozenset(
    (
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("prefill_chunk_size", "low_memory", "continuous_batching_config", "use_mtp"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "renormalize_logits"),
        *("transformers_version", "generation_kwargs"),
    )
)
# Values with which a setting does nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
    "top_h": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "remove_invalid_values": (False,),
}


def describe_generation(model: PreTrainedModel, kind: str, vocab_size: int) -> GenerationDefaults | None:
    """Generation defaults of a model, as its own ``generate`` takes them; ``None`` for an encoder.

    Args:
        model: the model.
        kind: one of ``adalink.runtime.storage.manifest.BASE_KINDS``.
        vocab_size: rows of its embedding table; ids beyond never occur and are left out.

    Raises:
        ModelError: a setting has a value that it cannot have.
    """
    config = getattr(model, "generation_config", None)
    if config is None or kind == "encoder":
        return None
    _check_readable(model)
    try:
        return _describe(config, kind, vocab_size)
    except (TypeError, ValueError, OverflowError) as error:  # such as a text where ids are expected
        raise ModelError(
            f"generation_config.json: a setting has a form that transformers does not know: {error}; correct it"
        ) from error


def _describe(config: Any, kind: str, vocab_size: int) -> GenerationDefaults:
    numbers = {name: _number(name, getattr(config, name, None)) for name in _NUMBERS}
    do_sample = bool(config.do_sample)
    if do_sample and numbers["top_k"] is None:
        numbers["top_k"] = _TOP_K
    if numbers["max_new_tokens"] is None and kind == "encoder-decoder" and config.max_length is not None:
        numbers["max_new_tokens"] = max(1, int(config.max_length) - 1)  # its start token counts
    ends = _ids(config.eos_token_id, vocab_size)
    bad_words = [tuple(words) for words in config.bad_words_ids or () if list(words) not in [[end] for end in ends]]
    biases = [(tuple(ids), float(bias)) for ids, bias in _biases(config.sequence_bias)]
    forced_bos = _ids(config.forced_bos_token_id, vocab_size)
    defaults = GenerationDefaults(
        do_sample=do_sample,
        **numbers,
        sequence_bias=tuple(
            SequenceBias(token_ids=ids, bias=bias) for ids, bias in biases if ids and max(ids) < vocab_size
        ),
        bad_words_ids=tuple(words for words in bad_words if words and max(words) < vocab_size),
        forced_bos_token_id=forced_bos[0] if forced_bos else None,
        forced_eos_token_ids=_ids(config.forced_eos_token_id, vocab_size),
        suppress_tokens=_ids(config.suppress_tokens, vocab_size),
        begin_suppress_tokens=_ids(config.begin_suppress_tokens, vocab_size),
        stop_strings=_texts(config.stop_strings),
        not_applied=_not_applied(config, kind),
    )
    if negative := [token for token in token_ids_of(defaults) if token < 0]:
        raise ModelError(f"the generation config names the token {negative[0]}, expected ids from 0: correct it")
    return defaults


def report(defaults: GenerationDefaults | None) -> list[str]:
    """Lines for the user: what is applied by default, and what is not.

    Args:
        defaults: those of the deployment's base; ``None`` for one without.
    """
    if defaults is None:
        return []
    lines = []
    if applied := defaults.applied():
        shown = ", ".join(f"{name}={_short(value)}" for name, value in applied.items())
        lines.append(f"generation defaults, applied unless a request says otherwise: {shown}")
    if defaults.not_applied:
        lines.append(f"generation settings that are not applied: {', '.join(defaults.not_applied)}")
    return lines


def _check_readable(model: PreTrainedModel) -> None:
    """Refuse a generation config that is no JSON, which transformers leaves out in silence; raises ``ModelError``."""
    path = Path(getattr(model, "name_or_path", "") or "") / "generation_config.json"
    if not path.is_file():
        return
    try:
        readable = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        readable = False
    if not readable:
        raise ModelError(f"{path} is not JSON with settings by name: correct it, or remove it to export without them")


def _number(name: str, value: Any) -> Any:
    """A number of the config in range; raises ``ModelError``."""
    if value is None:
        return None
    try:
        number = int(value) if name in _WHOLE else float(value)
        fault = range_fault(name, number) if number == value else "a whole number"
    except (TypeError, ValueError, OverflowError):
        fault = "a number"
    if fault is not None:
        raise ModelError(f"generation_config.json: {name} is {value!r}, expected {fault}: correct it and export again")
    return number


def _ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """One id or several as a tuple, without those beyond the vocabulary."""
    values: Iterable[Any] = () if value is None else [value] if isinstance(value, int) else list(value)
    return tuple(dict.fromkeys(int(token) for token in values if token < vocab_size))


def _texts(value: Any) -> tuple[str, ...]:
    """One text or several as a tuple; raises ``ModelError``."""
    texts = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ModelError(f"generation_config.json: stop_strings holds {text!r}, expected texts: correct it")
    return tuple(dict.fromkeys(texts))


def _biases(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else [tuple(entry) for entry in value or ()]


def _not_applied(config: Any, kind: str) -> tuple[str, ...]:
    """Settings that may change results and that the runtime does not have."""
    names = []
    for name, value in sorted(config.to_dict().items()):
        is_length = name == "max_length" and (kind == "encoder-decoder" or config.max_new_tokens is not None)
        if name.startswith("_") or name in _APPLIED or name in _HARMLESS or is_length:
            continue
        if value is not None and value not in _NEUTRAL.get(name, ()) and value not in ([], {}):
            names.append(f"{name}={_short(value)}")
    return tuple(names)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
