"""Rows that a tiny base learns in a few steps, for tests of the search."""

from __future__ import annotations

import random

from adalink.training.data.rows import TrainingRow


def make_rows(count: int, seed: int = 7) -> list[TrainingRow]:
    """Different rows whose completion is the letter that the prompt has most of."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        letter = draw.choice("ab")
        prompt = "".join(draw.choice([letter, letter, letter, "."]) for _ in range(11)) + letter
        rows[prompt] = TrainingRow(prompt, letter.upper())
    return list(rows.values())


ROWS = make_rows(80)
