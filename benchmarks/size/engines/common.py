"""One way to measure every engine: a script fills in ``Engine`` and calls ``main``, which prints one JSON object.

python -m benchmarks.size.engines.NAME measure --model PATH --prompts FILE      memory and times of one process
python -m benchmarks.size.engines.NAME accuracy --model PATH --rows FILE --adapters FILE

Only the standard library and NumPy are imported here: each script runs in the environment of its engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.peers.common import resident_bytes, warm_files
from benchmarks.size.accuracy import Row, measure, read_rows

# Every script prints these when it measures, and nothing else.
FIELDS = (
    "open_s",
    "first_token_ms",
    "tok_s_1",
    "tok_s_16",
    "resident_mb",
    "resident_16_mb",
    "first_tokens",
    "versions",
)
ROWS = 16
_SHOWN_TOKENS = 8


@dataclass(frozen=True)
class Settings:
    """How an engine is opened.

    Attributes:
        model: folder or file of the model.
        threads: threads of the engine.
        context: positions of a row alone.
        batch_context: positions of each row of a batch.
        table: float32 table of embeddings, for engines that are fed adapted embeddings and have none.
        adapters: weights of the tasks (``accuracy.HostEmbedder``); ``None`` where nothing is adapted.
    """

    model: Path
    threads: int
    context: int
    batch_context: int = 0
    table: Path | None = None
    adapters: Path | None = None


class Engine(ABC):
    """An open model, made from ``Settings``.

    Attributes:
        packages: whose versions are reported.
    """

    packages: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, settings: Settings) -> None: ...

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Continue prompts of one length greedily and together, without ending early."""

    @abstractmethod
    def logits(self, task: str, row: Row) -> npt.NDArray[np.float32]:
        """Scores ``(targets, vocab)`` at the last positions of a row, under a task."""


def main(open_engine: Callable[[Settings], Engine]) -> None:
    """Read the command line, run, print the JSON object."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    timed, scored = commands.add_parser("measure"), commands.add_parser("accuracy")
    for command in (timed, scored):
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--threads", type=int, default=2)
    timed.add_argument(
        "--prompts", type=Path, required=True, help="JSON: first, a prompt, and rows, prompts of a batch"
    )
    timed.add_argument("--new-tokens", type=int, default=64)
    timed.add_argument("--repeats", type=int, default=3)
    scored.add_argument("--rows", type=Path, required=True)
    scored.add_argument("--adapters", type=Path, required=True)
    scored.add_argument("--table", type=Path)
    scored.add_argument("--limit", type=int, help="the first rows of each task alone")
    options = parser.parse_args()
    gc.disable()
    if options.command == "measure":
        prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
        longest, longest_row = len(prompts["first"]), len(prompts["rows"][0])
        settings = Settings(
            options.model, options.threads, longest + options.new_tokens, longest_row + options.new_tokens
        )
        result = measure_engine(open_engine, settings, prompts, options.new_tokens, options.repeats)
    else:
        rows = read_rows(options.rows, options.limit)
        longest = max(len(row.ids) for of_task in rows.values() for row in of_task)
        settings = Settings(options.model, options.threads, longest, table=options.table, adapters=options.adapters)
        result = {"tasks": measure(rows, open_engine(settings).logits)}
    # Libraries may print what they like; the object is the last line.
    print(json.dumps(result), flush=True)


def measure_engine(
    open_engine: Callable[[Settings], Engine],
    settings: Settings,
    prompts: dict[str, list[list[int]]],
    new_tokens: int,
    repeats: int,
) -> dict[str, object]:
    """Open an engine and measure it; the values of ``FIELDS``.

    One row comes first, so that its memory is not that of the batch.
    """
    warm_files(settings.model if settings.model.is_dir() else settings.model.parent)
    begun = time.perf_counter()
    engine = open_engine(settings)
    result: dict[str, object] = {"open_s": time.perf_counter() - begun}
    first, rows = [prompts["first"]], prompts["rows"]
    result["first_tokens"] = engine.generate(first, _SHOWN_TOKENS)[0]  # type: ignore[arg-type]
    one, result["tok_s_1"] = _speed(engine, first, new_tokens, repeats)  # type: ignore[arg-type]
    result["first_token_ms"] = 1e3 * one
    result["resident_mb"] = resident_bytes() / 2**20
    engine.generate(rows, 2)
    result["tok_s_16"] = _speed(engine, rows, new_tokens, repeats)[1]
    result["resident_16_mb"] = resident_bytes() / 2**20
    result["versions"] = {name: metadata.version(name) for name in engine.packages}
    return result


def _speed(engine: Engine, prompts: list[list[int]], new_tokens: int, repeats: int) -> tuple[float, float]:
    """Seconds of a generation of one token, and tokens/s from the first token to the last, of all rows."""
    first = statistics.median(_seconds(engine, prompts, 1) for _ in range(repeats))
    whole = statistics.median(_seconds(engine, prompts, new_tokens) for _ in range(repeats))
    if whole <= first:
        raise RuntimeError(f"{new_tokens} tokens took {whole:.3f} s and one took {first:.3f} s: stop other programs")
    return first, len(prompts) * (new_tokens - 1) / (whole - first)


def _seconds(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
    begun = time.perf_counter()
    replies = engine.generate(prompts, new_tokens)
    seconds = time.perf_counter() - begun
    if [len(reply) for reply in replies] != [new_tokens] * len(prompts):
        raise RuntimeError(f"asked for {new_tokens} tokens, got {[len(reply) for reply in replies]}")
    return seconds
