"""Logits processors: penalties and bans, in the order and with the arithmetic of transformers.

Those that transformers lacks are OpenAI's, at vLLM's place: biases before the repetition penalty, the presence and
frequency penalties behind it.

A processor changes the logits of one row for its next token. What it knows of the row is the sequence so far: prompt
and generated tokens of a decoder, start token and generated tokens of an encoder-decoder. Soft prompts and images have
no token ids beyond their placeholders, and count as nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.implements import implements

if TYPE_CHECKING:
    from adalink.runtime.sampling.sampler import SamplingParams


class LogitsProcessor(Protocol):
    """Changes the logits of one row; keeps state, and so serves one row only."""

    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        """Change ``scores`` in place.

        Args:
            scores: float32 logits of the next token, shape ``(vocab,)``.
            sequence: token ids of the row so far, longer at each call.
        """
        ...


@dataclass(frozen=True)
class RowLimits:
    """What processors need to know of a row beside its tokens.

    Attributes:
        end_ids: token ids that end a row.
        begin: length of the sequence before its first new token.
        max_new_tokens: most new tokens.
    """

    end_ids: tuple[int, ...]
    begin: int
    max_new_tokens: int


@dataclass
class SequenceBiasProcessor:
    """Adds a number to the last token of a sequence where the sequence's other tokens precede it.

    Args:
        biases: token ids of each sequence, at least one, and its number; minus infinity bans it.
    """

    biases: Iterable[tuple[Sequence[int], float]]
    _following: dict[tuple[int, ...], dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for token_ids, bias in self.biases:
            last = self._following.setdefault(tuple(token_ids[:-1]), {})
            last[token_ids[-1]] = float(bias)
        self._lengths = sorted({len(prefix) for prefix in self._following})

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        total: dict[int, np.float32] = {}
        for length in self._lengths:
            if length <= len(sequence):
                for token, bias in self._following.get(_tail(sequence, length), {}).items():
                    total[token] = total.get(token, np.float32(0)) + np.float32(bias)
        if total:
            scores[list(total)] += np.array(list(total.values()), np.float32)


@dataclass
class RepetitionPenaltyProcessor:
    """Makes tokens of the sequence less likely, each once (arXiv 1909.05858)."""

    penalty: float
    _seen: dict[int, None] = field(default_factory=dict)
    _read: int = 0

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        self._seen.update(dict.fromkeys(sequence[self._read :]))
        self._read = len(sequence)
        tokens = np.fromiter(self._seen, np.int64, len(self._seen))
        values, penalty = scores[tokens], np.float32(self.penalty)
        scores[tokens] = np.where(values < 0, values * penalty, values / penalty)


@dataclass
class LogitBiasProcessor:
    """Adds a number to the logit of a token, as ``logit_bias`` of OpenAI's API."""

    biases: Mapping[int, float]

    def __post_init__(self) -> None:
        self._tokens = np.fromiter(self.biases, np.int64, len(self.biases))
        self._numbers = np.fromiter(self.biases.values(), np.float32, len(self.biases))

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        scores[self._tokens] += self._numbers


@dataclass
class OccurrencePenaltyProcessor:
    """Takes OpenAI's frequency and presence penalties from the logits of generated tokens; the prompt does not count.

    Args:
        presence: taken once.
        frequency: taken for each occurrence.
        begin: length of the sequence before its first new token.
    """

    presence: float
    frequency: float
    begin: int
    _counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._read = self.begin

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        for token in sequence[self._read :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._read = len(sequence)
        tokens = np.fromiter(self._counts, np.int64, len(self._counts))
        counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        scores[tokens] -= counts * np.float32(self.frequency)
        scores[tokens] -= np.float32(self.presence)


@dataclass
class NoRepeatNgramProcessor:
    """Bans every token that would complete an n-gram of the sequence a second time."""

    size: int
    _following: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    _read: int = 0

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        for end in range(max(self._read, self.size - 1), len(sequence)):
            prefix = tuple(sequence[end + 1 - self.size : end])
            self._following.setdefault(prefix, []).append(sequence[end])
        self._read = len(sequence)
        if len(sequence) >= self.size:
            scores[self._following.get(_tail(sequence, self.size - 1), [])] = -np.inf


@dataclass
class MinLengthProcessor:
    """Bans end tokens while the sequence is shorter than ``length``."""

    length: int
    end_ids: tuple[int, ...]

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        if len(sequence) < self.length:
            scores[list(self.end_ids)] = -np.inf


@dataclass
class ForcedTokenProcessor:
    """Leaves only ``token_ids`` when the sequence has ``length`` tokens."""

    length: int
    token_ids: tuple[int, ...]

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        if len(sequence) == self.length:
            scores[:] = -np.inf
            scores[list(self.token_ids)] = 0


@dataclass
class SuppressTokensProcessor:
    """Bans tokens always, or only when the sequence has ``length`` tokens."""

    token_ids: tuple[int, ...]
    length: int | None = None

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        if self.length is None or len(sequence) == self.length:
            scores[list(self.token_ids)] = -np.inf


def make_processors(params: SamplingParams, limits: RowLimits) -> list[LogitsProcessor]:
    """The processors of one row, in the order in which transformers applies them.

    Args:
        params: resolved sampling parameters.
        limits: the row's.
    """
    made: list[LogitsProcessor] = []
    if params.sequence_bias:
        made.append(SequenceBiasProcessor(params.sequence_bias))
    if params.logit_bias:
        made.append(LogitBiasProcessor(params.logit_bias))
    if params.repetition_penalty not in (None, 1):
        assert params.repetition_penalty is not None
        made.append(RepetitionPenaltyProcessor(params.repetition_penalty))
    presence, frequency = params.presence_penalty or 0.0, params.frequency_penalty or 0.0
    if presence or frequency:
        made.append(OccurrencePenaltyProcessor(presence, frequency, limits.begin))
    if params.no_repeat_ngram_size:
        made.append(NoRepeatNgramProcessor(params.no_repeat_ngram_size))
    ends = {(token,) for token in limits.end_ids}  # banned alone, they would never end a row: left out
    if bad_words := [tuple(words) for words in params.bad_words_ids or () if tuple(words) not in ends]:
        made.append(SequenceBiasProcessor([(words, -np.inf) for words in bad_words]))
    least = limits.begin + params.min_new_tokens if params.min_new_tokens else params.min_length
    if least and limits.end_ids:
        made.append(MinLengthProcessor(least, limits.end_ids))
    return made + _forced_and_suppressed(params, limits)


def _forced_and_suppressed(params: SamplingParams, limits: RowLimits) -> list[LogitsProcessor]:
    made: list[LogitsProcessor] = []
    if params.forced_bos_token_id is not None:
        made.append(ForcedTokenProcessor(1, (params.forced_bos_token_id,)))
    if params.forced_eos_token_ids:
        last = limits.begin + limits.max_new_tokens - 1
        made.append(ForcedTokenProcessor(last, tuple(params.forced_eos_token_ids)))
    if params.suppress_tokens:
        made.append(SuppressTokensProcessor(tuple(params.suppress_tokens)))
    if params.begin_suppress_tokens:
        is_forced = limits.begin <= 1 and params.forced_bos_token_id is not None
        made.append(SuppressTokensProcessor(tuple(params.begin_suppress_tokens), limits.begin + is_forced))
    return made


def _tail(sequence: Sequence[int], length: int) -> tuple[int, ...]:
    """The last ``length`` tokens."""
    return tuple(sequence[len(sequence) - length :])
