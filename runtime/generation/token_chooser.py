"""Token chooser: from a row's logits to its next token, through checks, logits processors and sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.finite import all_equal, not_numbers
from adalink.runtime.generation.prompt import Prompt
from adalink.runtime.sampling.logits_processors import LogitsProcessor, RowLimits, make_processors
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.manifest import Base


class TokenChooser:
    """Chooses the tokens of one row, in order.

    Every chosen token joins the sequence that logits processors see. Speculative decoding asks for a token only after
    those before it are accepted, so it needs no other sequence.
    """

    def __init__(
        self,
        params: SamplingParams,
        processors: Sequence[LogitsProcessor],
        sequence: list[int],
        generator: np.random.Generator,
        label: str,
    ) -> None:
        """Prepare one row.

        Args:
            params: resolved sampling parameters.
            processors: the row's logits processors.
            sequence: token ids before its first new token; tokens are appended.
            generator: the row's random stream.
            label: what errors call the row.
        """
        self._params = params
        self._processors = processors
        self._sequence = sequence
        self._begin = len(sequence)
        self._generator = generator
        self._label = label

    def __call__(self, logits: Array) -> int:
        """The next token.

        Args:
            logits: shape ``(vocab,)``; not changed.

        Raises:
            BackendError: they are not numbers.
            RequestError: the logits processors ban every token.
        """
        if self._processors:
            logits = self._process(logits)
        elif self._params.temperature:
            self._check(logits.max())
            self._check_differing(logits)
        token = self._params.choose(logits, self._generator)
        if not self._params.temperature:
            self._check(logits[token])  # at hand, and as good as the maximum: ``argmax`` finds NaN first
            if token == 0 and not self._processors:
                self._check_differing(logits)
        self._sequence.append(token)
        return token

    def _process(self, logits: Array) -> Array:
        scores = logits.astype(np.float32)
        self._check(scores.max())
        self._check_differing(scores)
        for process in self._processors:
            process(scores, self._sequence)
        if scores.max() == -np.inf:
            raise RequestError(
                f"{self._label}: bad words, suppressed tokens and the like, or the structured output, ban every token "
                f"{self._where}: allow some"
            )
        return scores

    def _check(self, best: np.floating) -> None:
        """Check a row's logits by the largest, which is NaN if any is."""
        if not math.isfinite(best):
            raise not_numbers("logits", float(best), self._label, self._where)

    def _check_differing(self, logits: Array) -> None:
        """Refuse logits that are all equal; ``argmax`` finds the first then, so other tokens need no look."""
        if len(logits) > 1 and logits.min() == logits[0] == logits.max():
            raise all_equal("logits", float(logits[0]), self._label, self._where)

    @property
    def _where(self) -> str:
        return f"for new token {len(self._sequence) - self._begin + 1}"


def sequence_begin(base: Base, prompt: Prompt, params: SamplingParams) -> int:
    """Length of a row's sequence before the first token of its text: behind a forced first token."""
    begin = 1 if base.kind == "encoder-decoder" and base.decoder_start_token_id is not None else len(prompt.token_ids)
    return begin + (begin == 1 and params.forced_bos_token_id is not None)


def make_chooser(
    params: SamplingParams,
    processors: Sequence[LogitsProcessor],
    base: Base,
    prompt: Prompt,
    end_ids: tuple[int, ...],
    generator: np.random.Generator,
    label: str,
) -> TokenChooser:
    """The chooser of one row.

    Args:
        params: resolved sampling parameters.
        processors: logits processors of the caller's, which come last.
        base: the contract.
        prompt: the row's prompt.
        end_ids: tokens that end the row.
        generator: the row's random stream.
        label: what errors call the row.
    """
    start = base.decoder_start_token_id
    sequence = [start] if base.kind == "encoder-decoder" and start is not None else list(prompt.token_ids)
    made = make_processors(params, RowLimits(end_ids, len(sequence), prompt.max_new_tokens))
    return TokenChooser(params, [*made, *processors], sequence, generator, label)
