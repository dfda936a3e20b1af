"""Accuracy of the example tasks, by one rule for every engine: the greedy reply is the completion and an end token.

A row counts if the likeliest token is the expected one at each place of the completion, which is then what greedy
generation writes. NumPy alone is imported, so that every engine's environment can run it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Logits (targets, vocab) at the last positions of a row, for a task.
LogitsOf = Callable[[str, "Row"], npt.NDArray[np.float32]]
_PROGRESS_ROWS = 200


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt, and of its completion with the end token."""

    prompt: list[int]
    target: list[int]

    @property
    def ids(self) -> list[int]:
        """What is fed: all but the end token."""
        return self.prompt + self.target[:-1]

    @property
    def positions(self) -> range:
        """Where each token of the target is predicted."""
        return range(len(self.prompt) - 1, len(self.ids))


def read_rows(path: Path, limit: int | None = None) -> dict[str, list[Row]]:
    """Rows of each task; the first ``limit`` of each, or all."""
    tasks: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {name: [Row(**row) for row in rows[:limit]] for name, rows in tasks.items()}


def measure(rows: dict[str, list[Row]], logits_of: LogitsOf) -> dict[str, dict[str, float]]:
    """Share of right rows of each task, and how many rows there were."""
    figures = {}
    for task, of_task in rows.items():
        right = 0
        for number, row in enumerate(of_task, 1):
            right += is_right(row, logits_of(task, row))
            if number % _PROGRESS_ROWS == 0:
                print(f"{task}: {number} of {len(of_task)} rows, {right} right", file=sys.stderr, flush=True)
        figures[task] = {"right": right / len(of_task), "rows": len(of_task)}
    return figures


def is_right(row: Row, logits: npt.NDArray[np.float32]) -> bool:
    """Whether the likeliest token is the expected one at each place; raises ``ValueError`` for another shape."""
    if len(logits) != len(row.target):
        raise ValueError(f"logits of {len(logits)} places, expected {len(row.target)}")
    if not np.isfinite(logits).all():
        raise ValueError("logits that are not numbers")
    return bool(logits.argmax(axis=1).tolist() == row.target)


@dataclass(frozen=True)
class HostEmbedder:
    """Adapted embeddings for engines that are fed them: ``x + up down x``, of tasks without an activation.

    Attributes:
        table: float32 embedding table with shape ``(vocab, d)``.
        tasks: ``down`` with shape ``(r, d)`` and ``up`` with shape ``(d, r)`` of each task.
    """

    table: npt.NDArray[np.float32]
    tasks: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]

    @classmethod
    def read(cls, table: npt.NDArray[np.float32], adapters: Path) -> HostEmbedder:
        """Tasks of the file that ``write_adapters`` wrote."""
        with np.load(adapters) as weights:
            names = sorted({name.rpartition(".")[0] for name in weights.files})
            return cls(table, {name: (weights[f"{name}.down"], weights[f"{name}.up"]) for name in names})

    def __call__(self, task: str, ids: list[int]) -> npt.NDArray[np.float32]:
        """Embeddings ``(tokens, d)``."""
        down, up = self.tasks[task]
        plain = self.table[ids]
        return np.asarray(plain + plain @ down.T @ up.T, np.float32)
