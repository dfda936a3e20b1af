"""Plan of a search, without a model: held-out rows, candidates, their steps, and their ranking."""

from __future__ import annotations

import math
import random
from itertools import product
from typing import TYPE_CHECKING

import msgspec

from adalink.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adalink.training.data.rows import TrainingRow
    from adalink.training.settings import SearchSettings

FEWEST_CANDIDATES = 3
_FEWEST_ROWS, _MOST_ROWS = 16, 200  # held out
_FIRST_SHARES = 8, 4  # first trials have between an eighth and a quarter of the final training's steps
_PLANNED_SHARE = 0.9  # of the time; the rest is for steps that take longer than those measured

Rungs = tuple[tuple[int, int], ...]  # number of candidates and steps of each rung


class Candidate(msgspec.Struct, frozen=True):
    """One combination of learning rate, rank and activation."""

    lr: float
    rank: int
    activation: str

    def __str__(self) -> str:
        return f"rate {self.lr:g}, rank {self.rank}, {self.activation}"


class Trial(msgspec.Struct, frozen=True):
    """A candidate trained for ``steps``; ``loss`` is on the held-out rows, ``None`` if it was not finite."""

    candidate: Candidate
    steps: int
    loss: float | None
    seconds: float


def split_rows(rows: Sequence[TrainingRow], seed: int) -> tuple[list[int], list[int]]:
    """Indices of training rows and of held-out rows: a tenth of the different rows, 16 to 200.

    Copies of a row are all on one side.

    Raises:
        DataError: there are fewer than 32 different rows.
    """
    different = list(dict.fromkeys(rows))
    if len(different) < 2 * _FEWEST_ROWS:
        raise DataError(
            f"a search needs at least {2 * _FEWEST_ROWS} different rows, {_FEWEST_ROWS} of them to choose by, and the "
            f"data has {len(different)}: add rows, or leave out --search"
        )
    held_out = set(random.Random(seed).sample(different, min(_MOST_ROWS, max(_FEWEST_ROWS, len(different) // 10))))
    learned = [index for index, row in enumerate(rows) if row not in held_out]
    indices = {row: index for index, row in enumerate(rows)}
    return learned, sorted(indices[row] for row in held_out)


def list_candidates(space: SearchSettings, hidden_size: int) -> list[Candidate]:
    """All combinations, in the order in which they are tried."""
    ranks = [rank for rank in space.ranks if rank <= hidden_size] or space.ranks
    return [
        Candidate(lr, rank, activation) for activation, rank, lr in product(space.activations, ranks, space.rates)
    ]  # fmt: skip


def plan_rungs(
    candidates: int, budget: float, spent: float, step_seconds: float, validation_seconds: float, longest: int
) -> Rungs:
    """Rungs with as many candidates as there is time for, and then as many steps.

    A rung has half the candidates of the previous one and twice its steps; the last two candidates go on together. No
    trial is longer than the final training. The first rung is short, for an early choice: a machine may become slower
    than it was when measured.

    Args:
        candidates: number of candidates.
        budget: seconds for the search.
        spent: seconds already used.
        step_seconds: time of a step.
        validation_seconds: time of the validation that ends a trial.
        longest: steps of the final training.

    Raises:
        ConfigError: there is no time for three candidates (or two, if there are no more).
    """

    def rungs(count: int, steps: int) -> Rungs:
        planned = [(count, steps)]
        while planned[-1][0] > 2 and planned[-1][1] < longest:
            planned.append((math.ceil(planned[-1][0] / 2), min(2 * planned[-1][1], longest)))
        return tuple(planned)

    def fits(planned: Rungs) -> bool:
        return spent + cost(planned) <= _PLANNED_SHARE * budget

    def cost(planned: Rungs) -> float:
        return sum(count * (steps * step_seconds + validation_seconds) for count, steps in planned)

    shortest, most = (math.ceil(longest / share) for share in _FIRST_SHARES)
    fewest = min(candidates, FEWEST_CANDIDATES)
    count = next((count for count in range(candidates, fewest - 1, -1) if fits(rungs(count, shortest))), None)
    if count is None:
        minutes = (spent + cost(rungs(fewest, shortest))) / _PLANNED_SHARE / 60
        raise ConfigError(
            f"a search of {budget / 60:.3g} minutes has no time for {fewest} candidates, trained for at least "
            f"{shortest} steps ({step_seconds:.2g} s each here): give it at least {math.ceil(100 * minutes) / 100:g} "
            "minutes, or lower --max-steps"
        )
    planned = next(rungs(count, steps) for steps in range(most, 0, -1) if fits(rungs(count, steps)))
    while planned[-1][1] < longest:
        longer = (*planned, (planned[-1][0], min(2 * planned[-1][1], longest)))
        if not fits(longer):
            break
        planned = longer
    return planned


def rank_trials(trials: Sequence[Trial]) -> list[Candidate]:
    """Candidates by the loss of their trials, the lowest first; ties go to the lower rank, then the lower rate.

    Diverged candidates are left out.
    """
    finite = [(trial.loss, trial.candidate) for trial in trials if trial.loss is not None]
    return [choice for _, choice in sorted(finite, key=lambda pair: (pair[0], pair[1].rank, pair[1].lr))]
