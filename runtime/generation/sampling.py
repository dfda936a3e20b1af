"""Sampling: the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adalink.runtime.arguments import check_whole
from adalink.runtime.errors import RequestError
from adalink.runtime.request import is_number


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters.

    Attributes:
        temperature: 0 is greedy decoding; higher values flatten the distribution.
        top_k: keep the k likeliest tokens.
        top_p: keep the smallest set of tokens whose probability reaches p (nucleus sampling, arXiv 1904.09751).
        seed: makes sampling reproducible; row ``i`` of a batch draws from the stream ``(seed, i)``.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature < np.inf:
            raise RequestError(f"temperature is {self.temperature!r}, expected a number of at least 0")
        if self.top_k is not None:
            check_whole(self.top_k, "top_k", 1)
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise RequestError(f"top_p is {self.top_p!r}, expected a number of more than 0 and at most 1")
        if self.seed is not None:
            check_whole(self.seed, "seed", 0)

    def generators(self, batch: int) -> list[np.random.Generator]:
        """One random stream for each row."""
        seed = int(np.random.default_rng().integers(1 << 63)) if self.seed is None else self.seed
        return [np.random.default_rng([seed, row]) for row in range(batch)]

    def choose(self, logits: npt.NDArray[np.floating], generator: np.random.Generator) -> int:
        """Next token from the logits of one position, shape ``(vocab,)``."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = self.distribution(logits)
        return int(generator.choice(len(probabilities), p=probabilities))

    def distribution(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """Probabilities, float64, that ``choose`` draws from when the temperature is above 0."""
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        # Very small temperatures overflow to minus infinity for all but the likeliest token, as intended.
        with np.errstate(over="ignore"):
            scaled /= self.temperature
        if self.top_k is not None and self.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = -np.inf
        weights = np.exp(scaled)
        probabilities: npt.NDArray[np.float64] = weights / weights.sum()
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0.0
            probabilities /= probabilities.sum()
        return probabilities
