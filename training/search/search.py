"""Rate, rank and activation chosen on held-out rows of the training data, within a time: ``adalink train --search``.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): every candidate is trained for a few steps, the better
half for twice as many from the start again, and so on. A trial is a whole short training, with a warm-up and a decay of
its own, so that it is the final training in small. All see the same rows in the same order, before one loaded base.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import structs
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.atomic import replace_file
from adalink.runtime.storage.digest import digest_bytes
from adalink.training.checkpoints import SEARCH_FILE
from adalink.training.method.attach import attach
from adalink.training.method.initialization import find_directions, follow_directions
from adalink.training.models.loading import embedding_matrix
from adalink.training.search.plan import (
    FEWEST_CANDIDATES,
    Candidate,
    Rungs,
    Trial,
    list_candidates,
    plan_rungs,
    rank_trials,
    split_rows,
)
from adalink.training.trainer import TrainableAdapters, trainer_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedModel

    from adalink.training.data.rows import Example, TrainingRow
    from adalink.training.method.config import AdaLinkConfig
    from adalink.training.settings import SearchSettings, TrainSettings
    from adalink.training.trainer import Collate

_MEASURED_STEPS = 4


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
    rows: Sequence[TrainingRow],
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
        loss_before, check, step = _measure(trials, candidates[0], clock)
        spent = clock() - started
        record = SearchRecord(
            minutes=space.minutes,
            learned_rows=len(learned),
            validation_rows=len(held),
            validation_sha256=digest_bytes(msgspec.json.encode([rows[i] for i in held])),
            loss_before=loss_before,
            step_seconds=step,
            validation_seconds=check,
            rungs=plan_rungs(len(candidates), 60 * space.minutes, spent, step, check, settings.max_steps),
            seconds=spent,
        )
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


def candidate_config(config: AdaLinkConfig, space: SearchSettings, model: PreTrainedModel) -> AdaLinkConfig:
    """The settings of the first candidate; whatever fits it fits all."""
    first = list_candidates(space, embedding_matrix(model).shape[1])[0]
    return structs.replace(config, rank=first.rank, activation=first.activation)


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
        self._directions: dict[str, torch.Tensor] | None = None

    def settings_of(self, candidate: Candidate) -> tuple[AdaLinkConfig, TrainSettings]:
        """The settings with the candidate's in them."""
        config = structs.replace(self._config, rank=candidate.rank, activation=candidate.activation)
        return config, replace(self._settings, lr=candidate.lr)

    def attach(self, candidate: Candidate) -> TrainableAdapters:
        """A fresh adapter of the candidate before the base; the caller takes it off."""
        set_seed(self._settings.seed)
        module = TrainableAdapters(attach(self._model, self.settings_of(candidate)[0]))
        if self._config.init == "gradient":
            if self._directions is None:  # at the base, so whatever the candidate
                size, seed = self._settings.batch_size, self._settings.seed
                self._directions = find_directions(
                    module, module.attached, self._learned, self._collate, batch_size=size, seed=seed
                )
            follow_directions(module.attached, self._directions)
        return module

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


def _measure(trials: _Trials, candidate: Candidate, clock: Callable[[], float]) -> tuple[float, float, float]:
    """The held-out rows' loss before training, the seconds that a look at them takes, and those of a step."""
    module = trials.attach(candidate)
    started = clock()
    with module.attached:
        loss = trials.validate(module)
        validated = clock()
        trials.train(module, candidate, _MEASURED_STEPS)
    return loss, validated - started, (clock() - validated) / _MEASURED_STEPS


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
        if len(done) < len(entered):
            say(f"search: the time is over after {len(done)} of {len(entered)} in round {number + 1}")
            if number == 0:
                _check_enough(record, len(done), len(entered))
                alive = rank_trials(list(done.values()))
            break
        alive = rank_trials(list(done.values())) or alive[count:]
    diverged = {trial.candidate for trial in record.trials if trial.loss is None}
    alive = [candidate for candidate in alive if candidate not in diverged]
    if not alive:
        raise ConfigError(
            f"a search tried {len(diverged)} candidates and all diverged, expected one with a finite loss: give a "
            "lower --lr, and see that the rows are what they should be"
        )
    record.seconds = seconds()
    record.winner = alive[0]
    _write(path, record)


def _check_enough(record: SearchRecord, tried: int, planned: int) -> None:
    """Whether a first round that time cut short says something; raises ``ConfigError``."""
    if tried < FEWEST_CANDIDATES:
        raise ConfigError(
            f"a search of {record.minutes:g} minutes tried {tried} of {planned} candidates, expected at least "
            f"{FEWEST_CANDIDATES}: this machine became slower than the {record.step_seconds:.2g} s a step that were "
            "measured; give it more minutes"
        )


def _write(path: Path, record: SearchRecord) -> None:
    data = msgspec.json.format(msgspec.json.encode(record), indent=2)
    replace_file(path, data, repair="free space and go on with --resume", durable=True)
