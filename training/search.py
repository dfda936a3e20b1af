"""Rate, rank and activation chosen on held-out rows of the training data, within a time: ``adalink train --search``.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): every candidate is trained for a few steps, the better
half for twice as many from the start again, and so on. A trial is a whole short training, with a warm-up and a decay of
its own, so that it is the final training in small. All see the same rows in the same order, before one loaded base.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from adalink.runtime.digest import digest_bytes
from adalink.runtime.errors import ConfigError, DataError, WriteError
from adalink.training.attach import attach
from adalink.training.base_model import embedding_matrix
from adalink.training.trainer import TrainableAdapters, trainer_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from adalink.training.config import AdaLinkConfig
    from adalink.training.dataset import Example, Row
    from adalink.training.settings import SearchSettings, TrainSettings
    from adalink.training.trainer import Collate

SEARCH_FILE = "search.json"
_FEWEST_ROWS, _MOST_ROWS = 16, 200  # held out
_FEWEST_CANDIDATES = 3
_SHORTEST_SHARE = 8  # the shortest trial has at least an eighth of the final training's steps
_MEASURED_STEPS = 4
_PLANNED_SHARE = 0.9  # of the time; the rest is for steps that take longer than those measured

Rungs = tuple[tuple[int, int], ...]  # of each: how many candidates, and for how many steps


class Candidate(msgspec.Struct, frozen=True):
    """What a search chooses."""

    lr: float
    rank: int
    activation: str

    def __str__(self) -> str:
        return f"rate {self.lr:g}, rank {self.rank}, {self.activation}"


class Trial(msgspec.Struct, frozen=True):
    """A candidate trained for ``steps``; ``loss`` is that of the held-out rows, ``None`` if it was not finite."""

    candidate: Candidate
    steps: int
    loss: float | None
    seconds: float


class SearchRecord(msgspec.Struct):
    """A search, under way or done: ``search.json`` in the checkpoints, and ``search`` in the report.

    Attributes:
        minutes: the time that was given.
        learned_rows: rows that trials learn from.
        validation_rows: rows held out from them.
        validation_sha256: digest of the rows held out.
        loss_before: their loss before any training.
        step_seconds: what a step took when it was measured.
        validation_seconds: what the loss of the rows held out took.
        rungs: how many candidates are trained for how many steps.
        trials: what was done.
        seconds: how long all that took.
        winner: the choice, once it is made.
    """

    minutes: float
    learned_rows: int
    validation_rows: int
    validation_sha256: str
    loss_before: float
    step_seconds: float
    validation_seconds: float
    rungs: Rungs
    seconds: float
    trials: list[Trial] = []
    winner: Candidate | None = None


def search(
    model: PreTrainedModel,
    rows: Sequence[Row],
    examples: Sequence[Example],
    collate: Collate,
    config: AdaLinkConfig,
    settings: TrainSettings,
    space: SearchSettings,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[AdaLinkConfig, TrainSettings, dict[str, Any]]:
    """Choose rate, rank and activation.

    Args:
        model: the base; as it was afterwards.
        rows: the rows to learn from.
        examples: the same, encoded.
        collate: makes batches of them.
        config: the other settings of the method.
        settings: the other settings of the training; no trial is longer than ``max_steps``.
        space: what to choose from, and the time.
        folder: where finished trials are kept, and found again after an interruption.
        say: told how it goes on, a line at a time.
        clock: time in seconds.

    Returns:
        the settings with the winner's in them, and the search as a section of a report.

    Raises:
        ConfigError: too little time, or no candidate's loss stayed finite.
        DataError: too few rows.
    """
    learned, held = split_rows(rows, settings.seed)
    trials = _Trials(model, [examples[i] for i in learned], [examples[i] for i in held], collate, config, settings)
    candidates = list_candidates(space, embedding_matrix(model).shape[1])
    path, started = folder / SEARCH_FILE, clock()
    if path.is_file():
        record = msgspec.json.decode(path.read_bytes(), type=SearchRecord)
    else:
        module = trials.attach(candidates[0])
        with module.attached:
            loss_before = trials.validate(module)
            validated = clock()
            trials.train(module, candidates[0], _MEASURED_STEPS)
        measured = clock()
        step, check = (measured - validated) / _MEASURED_STEPS, validated - started
        record = SearchRecord(
            minutes=space.minutes,
            learned_rows=len(learned),
            validation_rows=len(held),
            validation_sha256=digest_bytes(msgspec.json.encode([rows[i] for i in held])),
            loss_before=loss_before,
            step_seconds=step,
            validation_seconds=check,
            rungs=plan_rungs(
                len(candidates), 60 * space.minutes, measured - started, step, check, settings.max_steps
            ),
            seconds=measured - started,
        )  # fmt: skip
        _write(path, record)
        say(
            f"search: a step takes {step:.2g} s and {len(held)} held-out rows {check:.2g} s: "
            f"{record.rungs[0][0]} of {len(candidates)} candidates, "
            + ", then ".join(f"{count} for {steps} steps" for count, steps in record.rungs)
        )
    if record.winner is None:
        before, resumed = record.seconds, clock()
        _run_rungs(record, trials, candidates, path, say, lambda: before + clock() - resumed)
    assert record.winner is not None
    say(f"search: {record.winner} is trained on all {len(rows)} rows")
    config, settings = trials.settings_of(record.winner)
    return config, settings, msgspec.to_builtins(record)


def split_rows(rows: Sequence[Row], seed: int) -> tuple[list[int], list[int]]:
    """Which rows are learned from and which are held out: a tenth of the different ones, 16 to 200.

    Rows that stand several times are on one side.

    Raises:
        DataError: there are fewer than 32 different rows.
    """
    different = list(dict.fromkeys(rows))
    if len(different) < 2 * _FEWEST_ROWS:
        raise DataError(
            f"a search needs at least {2 * _FEWEST_ROWS} different rows, {_FEWEST_ROWS} of them to choose by, and the "
            f"data has {len(different)}: add rows, or leave out --search"
        )
    chosen = set(random.Random(seed).sample(different, min(_MOST_ROWS, max(_FEWEST_ROWS, len(different) // 10))))
    learned = [index for index, row in enumerate(rows) if row not in chosen]
    places = {row: index for index, row in enumerate(rows)}
    return learned, sorted(places[row] for row in chosen)


def list_candidates(space: SearchSettings, hidden_size: int) -> list[Candidate]:
    """All combinations, those first that are to be tried if not all can be."""
    ranks = [rank for rank in space.ranks if rank <= hidden_size] or space.ranks
    return [
        Candidate(lr, rank, activation) for activation, rank, lr in product(space.activations, ranks, space.rates)
    ]  # fmt: skip


def plan_rungs(
    candidates: int, budget: float, spent: float, step_seconds: float, validation_seconds: float, longest: int
) -> Rungs:
    """As many candidates as there is time for, and then as many steps.

    A rung has half the candidates of the one before and twice its steps. The last has two candidates, or ``longest``
    steps: a trial as long as the final training needs no longer one.

    Args:
        candidates: how many there are.
        budget: seconds for the search.
        spent: seconds that are gone already.
        step_seconds: time of a step.
        validation_seconds: time of the look at the held-out rows that ends a trial.
        longest: steps of the final training.

    Raises:
        ConfigError: there is not even time for three candidates (two, where there are no more).
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

    shortest = math.ceil(longest / _SHORTEST_SHARE)
    fewest = min(candidates, _FEWEST_CANDIDATES)
    count = next((count for count in range(candidates, fewest - 1, -1) if fits(rungs(count, shortest))), None)
    if count is None:
        minutes = (spent + cost(rungs(fewest, shortest))) / _PLANNED_SHARE / 60
        raise ConfigError(
            f"a search of {budget / 60:.3g} minutes has no time for {fewest} candidates, trained for at least "
            f"{shortest} steps ({step_seconds:.2g} s each here): give it at least {math.ceil(100 * minutes) / 100:g} "
            "minutes, or lower --max-steps"
        )
    return next(rungs(count, steps) for steps in range(longest, 0, -1) if fits(rungs(count, steps)))


def rank_trials(trials: Sequence[Trial]) -> list[Candidate]:
    """Candidates by the loss of their trials, the lowest first; of equal ones the lower rank, then the lower rate.

    Those that diverged are left out.
    """
    finite = [(trial.loss, trial.candidate) for trial in trials if trial.loss is not None]
    return [choice for _, choice in sorted(finite, key=lambda pair: (pair[0], pair[1].rank, pair[1].lr))]


class _Trials:
    """Trainings of candidates on the same rows, one after the other before one base."""

    def __init__(
        self,
        model: PreTrainedModel,
        learned: Sequence[Example],
        held: Sequence[Example],
        collate: Collate,
        config: AdaLinkConfig,
        settings: TrainSettings,
    ) -> None:
        self._model, self._learned, self._collate = model, learned, collate
        self._held = sorted(held, key=lambda example: len(example.prompt))  # of a length beside each other
        self._config, self._settings = config, settings

    def settings_of(self, candidate: Candidate) -> tuple[AdaLinkConfig, TrainSettings]:
        """The settings with the candidate's in them."""
        config = replace(self._config, rank=candidate.rank, activation=candidate.activation)
        return config, replace(self._settings, lr=candidate.lr)

    def attach(self, candidate: Candidate) -> TrainableAdapters:
        """A fresh adapter of the candidate before the base; the caller takes it off."""
        set_seed(self._settings.seed)
        return TrainableAdapters(attach(self._model, self.settings_of(candidate)[0]))

    def train(
        self, module: TrainableAdapters, candidate: Candidate, steps: int, callbacks: Sequence[TrainerCallback] = ()
    ) -> bool:
        """Train it; whether that went to the end."""
        schedule = replace(self._settings, lr=candidate.lr, max_steps=steps)
        with tempfile.TemporaryDirectory(prefix="adalink-search-") as folder:
            trainer = Trainer(
                model=module,
                args=trainer_arguments(folder, schedule, save_strategy="no", logging_strategy="no", disable_tqdm=True),
                train_dataset=self._learned,
                data_collator=self._collate,
                callbacks=list(callbacks),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return int(trainer.state.global_step) == steps

    def validate(self, module: TrainableAdapters) -> float:
        """Mean over the held-out rows of the mean loss over a completion's tokens."""
        module.eval()
        total = 0.0
        for start in range(0, len(self._held), self._settings.batch_size):
            batch = self._collate(self._held[start : start + self._settings.batch_size])
            inputs = {name: value.to(self._model.device) for name, value in batch.items()}
            total += float(module.row_losses(**inputs).double().sum())
        return total / len(self._held)


class _Deadline(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Ends a training after the step at which ``is_over`` says so."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self._is_over()


def _run_rungs(
    record: SearchRecord,
    trials: _Trials,
    candidates: Sequence[Candidate],
    path: Path,
    say: Callable[[str], None],
    seconds: Callable[[], float],
) -> None:
    """Do what is left of the plan within the time, and set the winner; every trial is kept as it ends."""
    last_moment = 60 * record.minutes - record.validation_seconds
    deadline = _Deadline(lambda: seconds() > last_moment)
    alive = list(candidates[: record.rungs[0][0]])  # the best first, once they were tried
    for number, (count, steps) in enumerate(record.rungs):
        done = {trial.candidate: trial for trial in record.trials if trial.steps == steps}
        entered = alive[:count]
        for candidate in entered:
            if candidate in done:
                continue
            began = seconds()
            module = trials.attach(candidate)
            with module.attached:
                if not trials.train(module, candidate, steps, [deadline]):
                    break
                loss = trials.validate(module)
            done[candidate] = Trial(
                candidate, steps, loss if math.isfinite(loss) else None, round(seconds() - began, 3)
            )  # fmt: skip
            record.trials.append(done[candidate])
            record.seconds = seconds()
            _write(path, record)
            say(
                f"search: {candidate}, {steps} steps: loss {loss:.4g} on held-out rows "
                f"({len(done)} of {len(entered)}, round {number + 1} of {len(record.rungs)})"
            )
        is_cut = len(done) < len(entered)
        if not is_cut:
            alive = rank_trials(list(done.values())) or alive[count:]
        elif number == 0:
            alive = rank_trials(list(done.values())) if len(done) >= _FEWEST_CANDIDATES else []
        if is_cut:
            say(f"search: the time is over after {len(done)} of {len(entered)} in round {number + 1}")
            break
    diverged = {trial.candidate for trial in record.trials if trial.loss is None}
    alive = [candidate for candidate in alive if candidate not in diverged]
    if not alive:
        raise ConfigError(
            f"a search of {record.minutes:g} minutes tried {len(record.trials)} candidates and {len(diverged)} "
            "diverged, expected at least one with a finite loss out of three: give it more minutes, or a lower --lr"
        )
    record.seconds = seconds()
    record.winner = alive[0]
    _write(path, record)


def _write(path: Path, record: SearchRecord) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".draft")
    try:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))
        draft.replace(path)
    except OSError as error:
        raise WriteError(
            f"search: cannot write {path}: {error.strerror}; free space and go on with --resume"
        ) from error
