"""How much is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROMPT_TOKENS = 128
TASK_RANK = 16
# As many as the largest batch has rows, and two.
TASKS = 66
# Over how many tasks the memory of one of them is measured.
RANK_TASKS = 18
# The prompt whose prefill gives the cost model its rate.
RATE_LENGTH = 256


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        rounds: processes of each case, the cases taking turns.
        new_tokens: tokens that each generates.
        repeats: short measurements in each process.
        growth: for each series, the numbers that cost is measured at.
    """

    rounds: int
    new_tokens: int
    repeats: int
    growth: Mapping[str, tuple[int, ...]]


FULL = Scale(
    rounds=11,
    new_tokens=256,
    repeats=5,
    growth={
        "tasks": (1, 10, 100, 1000, 10_000),
        "rank": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        "sequence": (1, 4, 16, 64, 256, 1024, 4096),
        "batch": (1, 2, 4, 8, 16, 32, 64),
    },
)
QUICK = Scale(
    rounds=1,
    new_tokens=64,
    repeats=3,
    growth={"tasks": (1, 10, 100), "rank": (1, 16, 256), "sequence": (1, 16, 256), "batch": (1, 4, 16)},
)
