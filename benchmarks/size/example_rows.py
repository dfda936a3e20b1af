"""Test rows of the example tasks as token ids, the tasks' weights, and prompts for speed, for engines of any kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.text.tokenizer import Tokenizer
from benchmarks.prepare import make_prompt
from benchmarks.size.engines.common import ROWS
from examples.make_data import TASKS

ADAPTERS = Path(__file__).parents[2] / "examples/adapters"
FIRST_TOKENS, ROW_TOKENS = 128, 16


def write_rows(path: Path, tokenizer: Tokenizer, end_token: int) -> None:
    """All test rows of each task (``accuracy.read_rows``)."""
    tasks = {
        name: [
            {
                "prompt": tokenizer.encode(row["prompt"]),
                "target": [*tokenizer.encode_plain(row["completion"]), end_token],
            }
            for row in make()["test"]
        ]
        for name, make in TASKS.items()
    }
    path.write_text(json.dumps(tasks), encoding="utf-8")


def write_adapters(path: Path) -> None:
    """``down`` and ``up`` of each task (``accuracy.HostEmbedder``).

    Raises:
        ValueError: a task has an activation, a bias or other modalities than text.
    """
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name in TASKS:
        adapter = read_adapter(ADAPTERS / name)
        if adapter.config.activation != "identity" or adapter.config.bias or adapter.config.modalities != ("text",):
            raise ValueError(f"task {name} is not of the form x + up down x, which HostEmbedder computes")
        arrays |= {f"{name}.{part}": adapter.weights[f"text.{part}.weight"] for part in ("down", "up")}
    np.savez(path, allow_pickle=False, **arrays)


def write_prompts(path: Path, tokenizer: Tokenizer) -> None:
    """A prompt of ``FIRST_TOKENS``, and different ones of ``ROW_TOKENS`` for a batch."""
    ids = make_prompt(tokenizer, FIRST_TOKENS)["ids"]
    assert isinstance(ids, list)
    step = (FIRST_TOKENS - ROW_TOKENS) // (ROWS - 1)
    rows = [ids[row * step : row * step + ROW_TOKENS] for row in range(ROWS)]
    path.write_text(json.dumps({"first": ids, "rows": rows}), encoding="utf-8")
