"""Generation defaults of a base: what its ``generation_config.json`` says of how tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import msgspec

Demand = Callable[[bool, str, object, str], None]


class SequenceBias(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number added to the logit of the last of these tokens, wherever the others precede it."""

    token_ids: tuple[int, ...]
    bias: float


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a base generates unless a request says otherwise; names and meanings are those of transformers.

    ``None`` and empty tuples mean that the checkpoint asks for nothing.

    Attributes:
        do_sample: sample, rather than take the likeliest token.
        temperature: of sampling; 1 where the checkpoint samples and names none.
        top_k: keep the k likeliest tokens; 0 keeps all. 50 where the checkpoint samples and names none.
        top_p: keep the smallest set of tokens whose probability reaches p.
        min_p: keep tokens of at least this share of the likeliest one's probability.
        repetition_penalty: divides positive logits of tokens that are in the sequence, and multiplies negative ones.
        no_repeat_ngram_size: n-grams of this size occur once; 0 for no limit.
        sequence_bias: numbers added to logits.
        bad_words_ids: sequences that never occur.
        min_length: an end token is excluded while the sequence, prompt included, is shorter.
        min_new_tokens: an end token is excluded before so many new tokens.
        forced_bos_token_id: the token after a sequence of one token, such as an encoder-decoder's start.
        forced_eos_token_ids: one of these is the last token that ``max_new_tokens`` allows.
        suppress_tokens: tokens that never occur.
        begin_suppress_tokens: tokens that are never the first.
        max_new_tokens: most new tokens of a prompt.
        stop_strings: texts that end a row.
        not_applied: settings of the checkpoint that the runtime does not apply, each as ``name=value``.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    sequence_bias: tuple[SequenceBias, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int | None = None
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    not_applied: tuple[str, ...] = ()

    def applied(self) -> dict[str, object]:
        """The settings that the checkpoint asks for and the runtime applies."""
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name != "not_applied"}
        return {name: value for name, value in values.items() if value not in (None, (), False)}


# The least value of each number, whether it may be that value itself, and the greatest.
_RANGES: dict[str, tuple[float, bool, float]] = {
    "temperature": (0, True, math.inf),
    "top_k": (0, True, math.inf),
    "top_p": (0, False, 1),
    "min_p": (0, True, 1),
    "repetition_penalty": (0, False, math.inf),
    "no_repeat_ngram_size": (0, True, math.inf),
    "min_length": (0, True, math.inf),
    "min_new_tokens": (0, True, math.inf),
    "max_new_tokens": (1, True, math.inf),
}


def range_fault(name: str, value: float) -> str | None:
    """What was expected of the number ``value`` of a setting; ``None`` if it is in range."""
    low, is_inclusive, high = _RANGES[name]
    is_finite = math.isfinite(value)
    if is_finite and (low <= value if is_inclusive else low < value) and value <= high:
        return None
    least = f"at least {low:g}" if is_inclusive else f"more than {low:g}"
    return f"a number of {least}" + ("" if math.isinf(high) else f" and at most {high:g}")


def token_ids_of(generation: GenerationDefaults) -> Iterator[int]:
    """All token ids that the defaults name."""
    sequences: Iterable[tuple[int, ...]] = (
        *(entry.token_ids for entry in generation.sequence_bias),
        *generation.bad_words_ids,
        generation.forced_eos_token_ids,
        generation.suppress_tokens,
        generation.begin_suppress_tokens,
    )
    for sequence in sequences:
        yield from sequence
    if generation.forced_bos_token_id is not None:
        yield generation.forced_bos_token_id


def check_generation(generation: GenerationDefaults, vocab_size: int, demand: Demand) -> None:
    """Validate generation defaults; calls ``demand`` of the manifest's validation."""
    for name in _RANGES:
        value = getattr(generation, name)
        fault = None if value is None else range_fault(name, value)
        demand(fault is None, f"$.base.generation.{name}", value, f"{fault}, or null")
    for token in token_ids_of(generation):
        demand(0 <= token < vocab_size, "$.base.generation", token, "ids in the vocabulary")
    sequences = (*(entry.token_ids for entry in generation.sequence_bias), *generation.bad_words_ids)
    demand(all(sequences), "$.base.generation", sequences, "sequences of at least one token")
    demand(all(generation.stop_strings), "$.base.generation.stop_strings", generation.stop_strings, "no empty text")
    for entry in generation.sequence_bias:
        demand(math.isfinite(entry.bias), "$.base.generation.sequence_bias", entry.bias, "finite numbers")
