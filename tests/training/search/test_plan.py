"""The rounds of a search without a model: candidates whose losses are known, on a clock that is."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from adalink.runtime.errors import ConfigError
from adalink.training.data.rows import Example
from adalink.training.method.config import AdaLinkConfig
from adalink.training.search.plan import Candidate, Rungs, list_candidates
from adalink.training.search.search import SearchRecord, _run_rungs, _Trials
from adalink.training.settings import SearchSettings, TrainSettings

STEP_S, CHECK_S = 1.0, 5.0
A, B, C, D = (Candidate(lr, 4, "gelu") for lr in (1e-3, 1e-2, 3e-2, 1e-1))
Losses = dict[tuple[Candidate, int], float]


class Trials:
    """Trainings that take a second a step, and end where time is over."""

    def __init__(self, losses: Losses) -> None:
        self.now, self.losses, self.steps = 0.0, losses, 0

    def attach(self, candidate: Candidate) -> Any:
        return SimpleNamespace(attached=nullcontext(), candidate=candidate)

    def train(self, module: Any, candidate: Candidate, steps: int, callbacks: list[Any]) -> bool:
        assert module.candidate is candidate
        for self.steps in range(1, steps + 1):
            self.now += STEP_S
            if any(callback._is_over() for callback in callbacks):
                break
        return self.steps == steps

    def validate(self, module: Any) -> float:
        self.now += CHECK_S
        return self.losses[module.candidate, self.steps]


def search(folder: Path, rungs: Rungs, losses: Losses, minutes: float = 60) -> tuple[SearchRecord, Trials]:
    record = SearchRecord(minutes, 1, 1, "sha256:0", 9.0, STEP_S, CHECK_S, rungs, 0.0, trials=[])
    trials = Trials(losses)
    _run_rungs(record, trials, [A, B, C, D], folder / "search.json", lambda line: None, lambda: trials.now)  # type: ignore[arg-type]
    assert msgspec.json.decode((folder / "search.json").read_bytes(), type=SearchRecord) == record
    return record, trials


def test_where_the_better_half_diverges_later_the_next_one_leads(tmp_path: Path) -> None:
    losses = {(A, 10): 0.4, (B, 10): 0.2, (C, 10): math.nan, (D, 10): 0.3, (B, 20): math.inf, (D, 20): math.nan}
    record, _ = search(tmp_path, ((4, 10), (2, 20)), losses)
    assert record.winner == A
    assert [(trial.candidate, trial.loss) for trial in record.trials] == [
        (A, 0.4), (B, 0.2), (C, None), (D, 0.3), (B, None), (D, None)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="tried 4 candidates and all diverged"):
        search(tmp_path, ((4, 10),), {(candidate, 10): math.inf for candidate in (A, B, C, D)})


def test_one_that_diverged_as_time_ended_does_not_win(tmp_path: Path) -> None:
    """B led the first round and diverged in the next, which was cut short before C was done."""
    losses = {(A, 10): 0.4, (B, 10): 0.2, (C, 10): 0.3, (B, 20): math.nan}
    record, _ = search(tmp_path, ((3, 10), (2, 20)), losses, minutes=1.5)
    assert [(trial.candidate, trial.steps) for trial in record.trials] == [(A, 10), (B, 10), (C, 10), (B, 20)]
    assert record.winner == C


def test_ranks_as_wide_as_the_embedding_are_tried() -> None:
    def ranks(*given: int) -> list[int]:
        space = SearchSettings(minutes=1, rates=(1e-3,), ranks=given, activations=("relu", "gelu"))
        return [candidate.rank for candidate in list_candidates(space, 48) if candidate.activation == "relu"]

    assert ranks(4, 48, 49, 64) == [4, 48]
    assert ranks(49, 64) == [49, 64]  # which is refused where the method is tried out


@pytest.mark.parametrize("steps", [9, 11, 12, 13, 15, 40])
def test_the_last_look_at_the_held_out_rows_is_within_the_time(tmp_path: Path, steps: int) -> None:
    """Three first trials take 45 s of 60: what is then not trained by 55 s, but for the step on its way, ends."""
    losses = {(A, 10): 0.4, (B, 10): 0.2, (C, 10): 0.3, (B, steps): 0.5}
    record, trials = search(tmp_path, ((3, 10), (1, steps)), losses, minutes=1)
    assert trials.now <= 60 + STEP_S
    assert record.seconds == trials.now
    assert record.winner == B
    assert len(record.trials) == (4 if steps <= 11 else 3)


def test_the_loss_of_held_out_rows_is_their_mean_with_nothing_dropped() -> None:
    """Five rows in batches of two: each row counts the same."""

    class Module(nn.Module):
        attached = SimpleNamespace(model=SimpleNamespace(device="cpu"))

        def row_losses(self, rows: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return rows.float() ** 2

    held = [Example([7] * number, [1]) for number in (4, 1, 5, 2, 3)]
    own = _Trials(
        SimpleNamespace(device="cpu"),  # type: ignore[arg-type]
        [],
        held,
        lambda examples: {"rows": torch.tensor([len(example.prompt) for example in examples])},
        AdaLinkConfig(),
        TrainSettings(batch_size=2),
    )
    assert own.validate(Module().train()) == 11  # type: ignore[arg-type]
