"""Sampling: the next token from logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arguments import check_whole
from adalink.runtime.errors import RequestError
from adalink.runtime.request import is_number
from adalink.runtime.storage.generation_schema import GenerationDefaults, range_fault

_WHOLE = ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens")
_RATIOS = ("top_p", "min_p", "repetition_penalty")
_PENALTIES = ("presence_penalty", "frequency_penalty")
# Limits of OpenAI's API: of the penalties, and of a bias.
_MOST_PENALTY, _MOST_BIAS = 2, 100
# No checkpoint has defaults of these, or one of another form.
_NO_DEFAULT = ("temperature", "seed", "sequence_bias", "logit_bias", *_PENALTIES)
_ID_LISTS = ("forced_eos_token_ids", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters; ``None`` is the base's default, from its ``generation_config.json``.

    Attributes:
        temperature: 0 is greedy decoding; higher values flatten the distribution. Without a default of the base: 0.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv 1904.09751).
        seed: makes sampling reproducible; row ``i`` of a call draws from the stream ``(seed, i)``, wherever it runs.
        min_p: keep tokens of at least this share of the likeliest one's probability (arXiv 2407.01082); 0 keeps all.
        repetition_penalty: above 1, makes tokens of the prompt and text less likely (arXiv 1909.05858); 1 is off.
        no_repeat_ngram_size: n-grams of this size occur once, prompt included; 0 is off.
        sequence_bias: pairs of token ids and a number, which is added to the logit of the last one after the others.
        bad_words_ids: sequences of token ids that never occur.
        min_length: no end token while prompt and text are shorter; 0 is off.
        min_new_tokens: no end token before so many new tokens; 0 is off. Takes precedence over ``min_length``.
        forced_bos_token_id: the token after a sequence of one token, such as an encoder-decoder's start token.
        forced_eos_token_ids: one of these is the last token within ``max_new_tokens``.
        suppress_tokens: token ids that never occur.
        begin_suppress_tokens: token ids that are never the first.
        presence_penalty: taken once from the logit of every generated token, -2 to 2; 0 is off. OpenAI's, as the next:
        frequency_penalty: taken from the logit of a generated token each time it occurred, -2 to 2; 0 is off.
        logit_bias: numbers, -100 to 100, which are added to the logits of token ids; -100 all but bans a token.
        base_defaults: whether fields left ``None`` are the base's; ``False`` turns them off.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    sequence_bias: Sequence[tuple[Sequence[int], float]] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: Sequence[int] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    base_defaults: bool = True

    def __post_init__(self) -> None:
        temperature = self.temperature
        if temperature is not None and (not is_number(temperature) or not 0 <= temperature < np.inf):
            raise RequestError(f"temperature is {temperature!r}, expected a number of at least 0")
        for name in _WHOLE:
            if (value := getattr(self, name)) is not None:
                check_whole(value, name, 0)
        for name in _RATIOS:
            value = getattr(self, name)
            if value is not None and (fault := range_fault(name, value) if is_number(value) else "a number"):
                raise RequestError(f"{name} is {value!r}, expected {fault}")
        if self.seed is not None:
            check_whole(self.seed, "seed", 0)
        if self.forced_bos_token_id is not None:
            check_whole(self.forced_bos_token_id, "forced_bos_token_id", 0)
        for name in _ID_LISTS:
            _check_ids(getattr(self, name), name)
        for entry in _entries(self.bad_words_ids, "bad_words_ids"):
            _check_ids(entry, "bad_words_ids", least=1)
        for entry in _entries(self.sequence_bias, "sequence_bias"):
            if not isinstance(entry, Sequence) or len(entry) != 2 or not is_number(entry[1]) or np.isnan(entry[1]):
                raise RequestError(f"sequence_bias holds {entry!r:.80}, expected pairs of token ids and a number")
            _check_ids(entry[0], "sequence_bias", least=1)
        for name in _PENALTIES:
            if (value := getattr(self, name)) is not None:
                _check_within(value, name, _MOST_PENALTY)
        if self.logit_bias is not None:
            _check_biases(self.logit_bias)

    def resolve(self, defaults: GenerationDefaults | None, vocab_size: int) -> SamplingParams:
        """These parameters with the base's defaults filled in; what is still ``None`` is off.

        Args:
            defaults: those of the base; ``None`` if it has none.
            vocab_size: rows of the embedding table.

        Raises:
            RequestError: a token id is not in the vocabulary.
        """
        self._check_vocabulary(vocab_size)
        if defaults is None or not self.base_defaults:
            return replace(self, temperature=self.temperature or 0.0)
        filled: dict[str, Any] = {}
        for field in fields(self):
            if getattr(self, field.name) is None and field.name not in _NO_DEFAULT:
                filled[field.name] = getattr(defaults, field.name)
        if self.sequence_bias is None:
            filled["sequence_bias"] = tuple((entry.token_ids, entry.bias) for entry in defaults.sequence_bias)
        if self.temperature is None:
            sampled = 1.0 if defaults.temperature is None else defaults.temperature
            filled["temperature"] = sampled if defaults.do_sample else 0.0
        if self.min_length is not None and self.min_new_tokens is None:  # the request's own limit counts
            filled["min_new_tokens"] = 0
        return replace(self, **filled)

    def choose(self, logits: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
        """Next token from the logits of one position, shape ``(vocab,)``."""
        if not self.temperature:
            return int(logits.argmax())
        probabilities = self.distribution(logits)
        return int(generator.choice(len(probabilities), p=probabilities))

    def distribution(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Probabilities, float64, that ``choose`` draws from when the temperature is above 0."""
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        # Very small temperatures overflow to minus infinity for all but the likeliest token, as intended.
        with np.errstate(over="ignore"):
            scaled /= 1.0 if self.temperature is None else self.temperature
        if self.top_k and self.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = -np.inf
        weights = np.exp(scaled)
        probabilities: npt.NDArray[np.float64] = weights / weights.sum()
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0.0
            probabilities /= probabilities.sum()
        if self.min_p:
            probabilities[probabilities < self.min_p * probabilities.max()] = 0.0
            probabilities /= probabilities.sum()
        return probabilities

    def _check_vocabulary(self, vocab_size: int) -> None:
        lists = [(name, getattr(self, name) or ()) for name in _ID_LISTS]
        lists += [("bad_words_ids", entry) for entry in self.bad_words_ids or ()]
        lists += [("sequence_bias", entry[0]) for entry in self.sequence_bias or ()]
        lists += [("logit_bias", tuple(self.logit_bias or ()))]
        lists += [("forced_bos_token_id", () if self.forced_bos_token_id is None else (self.forced_bos_token_id,))]
        for name, ids in lists:
            if bad := [token for token in ids if token >= vocab_size]:
                raise RequestError(f"{name} holds {bad[0]}, expected token ids from 0 to {vocab_size - 1}")


def _entries(value: Sequence[object] | None, name: str) -> list[object]:
    if value is None:
        return []
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise RequestError(f"{name} is {value!r:.80}, expected a list")
    return list(value)


def _check_ids(value: object, name: str, least: int = 0) -> None:
    """Check a list of token ids; raises ``RequestError``."""
    if value is None:
        return
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) < least:
        raise RequestError(f"{name} is {value!r:.80}, expected a list of {'at least one token id' if least else 'ids'}")
    for token in value:
        check_whole(token, name, 0)


def _check_within(value: object, name: str, most: float) -> None:
    """Check a number of at most ``most``, and at least its negative; raises ``RequestError``."""
    if not is_number(value) or not -most <= value <= most:  # type: ignore[operator]  # a number by then
        raise RequestError(f"{name} is {value!r:.80}, expected a number from -{most} to {most}")


def _check_biases(biases: object) -> None:
    """Check biases of token ids; raises ``RequestError``."""
    if not isinstance(biases, Mapping):
        raise RequestError(f"logit_bias is {biases!r:.80}, expected a mapping of token ids to numbers")
    for token, bias in biases.items():
        check_whole(token, "logit_bias, a token id,", 0)
        _check_within(bias, f"logit_bias of token {token}", _MOST_BIAS)


# As accuracy is measured in training: the likeliest token each time, whatever the checkpoint's own settings.
PLAIN_GREEDY = SamplingParams(temperature=0.0, base_defaults=False)
