"""Hyperparameter search within a time limit: learning rate, rank and activation, for ``adalink train --search``.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) on held-out rows of the training data. Every candidate is
trained for a few steps, the better half for twice as many from scratch, and so on. A trial is a complete short training
with its own warm-up and decay. All trials share one loaded base, and use the same rows in the same order.
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
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.digest import digest_bytes
from adalink.training.loop.checkpoints import SEARCH_FILE
from adalink.training.loop.trainer import TrainableAdapters, mean_loss, trainer_arguments
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedModel

    from adalink.training.data.rows import Example, TrainingRow
    from adalink.training.loop.trainer import Collate
    from adalink.training.method.config import AdaLinkConfig
    from adalink.training.settings import SearchSettings, TrainSettings

_MEASURED_STEPS = 4


class SearchRecord(msgspec.Struct):
    """State of a search: ``search.json`` in the checkpoints, and ``search`` in the report.

    Attributes:
        minutes: time limit.
        learned_rows: number of rows that trials train on.
        validation_rows: number of held-out rows.
        validation_sha256: digest of the held-out rows.
        loss_before: their loss before training.
        step_seconds: measured time of a step.
        validation_seconds: measured time of a validation.
        rungs: number of candidates and steps of each rung.
        trials: finished trials.
        seconds: time used so far.
        winner: the chosen candidate, at the end.
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
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[AdaLinkConfig, TrainSettings, dict[str, Any]]:
    """Choose rate, rank and activation.

    Args:
        model: the base; unchanged afterwards.
        rows: training rows.
        examples: the same, encoded.
        collate: makes batches of them.
        config: the other settings of the method.
        settings: the other settings of the training; no trial is longer than ``max_steps``.
        space: search space and time limit.
        folder: folder of finished trials, to resume from after an interruption.
        progress: callback, called with one line per trial.
        clock: clock in seconds.

    Returns:
        Both settings with the winner's values, and the search as a section of the report.

    Raises:
        ConfigError: too little time, or no candidate's loss stayed finite.
        DataError: too few rows.
    """
    learned, held = split_rows(rows, settings.seed)
    trials = _Trials(model, [examples[i] for i in learned], [examples[i] for i in held], collate, config, settings)
    candidates = list_candidates(space, embedding_matrix(model).shape[1])
    path, started = folder / SEARCH_FILE, clock()
    if path.is_file():
        record = _read(path)
    else:
        loss_before, validation_seconds, step_seconds = _measure(trials, candidates[0], clock)
        spent = clock() - started
        record = SearchRecord(
            minutes=space.minutes,
            learned_rows=len(learned),
            validation_rows=len(held),
            validation_sha256=digest_bytes(msgspec.json.encode([rows[i].content for i in held])),
            loss_before=loss_before,
            step_seconds=step_seconds,
            validation_seconds=validation_seconds,
            rungs=plan_rungs(
                len(candidates), 60 * space.minutes, spent, step_seconds, validation_seconds, settings.max_steps
            ),
            seconds=spent,
        )
        _write(path, record)
        progress(
            f"search: a step takes {step_seconds:.2g} s and {len(held)} held-out rows {validation_seconds:.2g} s: "
            f"{record.rungs[0][0]} of {len(candidates)} candidates, "
            + ", then ".join(f"{count} for {steps} steps" for count, steps in record.rungs)
        )
    if record.winner is None:
        before, resumed = record.seconds, clock()
        _run_rungs(record, trials, candidates, path, progress, lambda: before + clock() - resumed)
    assert record.winner is not None
    progress(f"search: {record.winner} is trained on all {len(rows)} rows")
    config, settings = trials.settings_of(record.winner)
    return config, settings, msgspec.to_builtins(record)


def candidate_config(config: AdaLinkConfig, space: SearchSettings, model: PreTrainedModel) -> AdaLinkConfig:
    """Settings of the first candidate; a base that fits it fits all candidates."""
    first = list_candidates(space, embedding_matrix(model).shape[1])[0]
    return structs.replace(config, rank=first.rank, activation=first.activation)


class _Trials:
    """Trains candidates one after the other, on the same rows and one base."""

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
        self._held = sorted(held, key=lambda example: len(example.prompt))  # rows of similar length share a batch
        self._config, self._settings = config, settings
        self._directions: dict[str, torch.Tensor] | None = None

    def settings_of(self, candidate: Candidate) -> tuple[AdaLinkConfig, TrainSettings]:
        """Both settings with the candidate's values."""
        config = structs.replace(self._config, rank=candidate.rank, activation=candidate.activation)
        return config, replace(self._settings, lr=candidate.lr)

    def attach(self, candidate: Candidate) -> TrainableAdapters:
        """Attach a new adapter of the candidate; the caller detaches it."""
        set_seed(self._settings.seed)
        module = TrainableAdapters(attach(self._model, self.settings_of(candidate)[0]))
        if self._config.init == "gradient":
            if self._directions is None:  # the same for all candidates: they depend on the base alone
                size, seed = self._settings.batch_size, self._settings.seed
                self._directions = find_directions(
                    module, module.attached, self._learned, self._collate, batch_size=size, seed=seed
                )
            follow_directions(module.attached, self._directions)
        return module

    def train(
        self, module: TrainableAdapters, candidate: Candidate, steps: int, callbacks: Sequence[TrainerCallback] = ()
    ) -> bool:
        """Train the candidate; returns whether all steps were done."""
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
        return mean_loss(module, self._held, self._collate, self._settings.batch_size)


def _measure(trials: _Trials, candidate: Candidate, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Validation loss before training, and seconds of a validation and of a step."""
    module = trials.attach(candidate)
    started = clock()
    with module.attached:
        loss = trials.validate(module)
        validated = clock()
        trials.train(module, candidate, _MEASURED_STEPS)
    return loss, validated - started, (clock() - validated) / _MEASURED_STEPS


class _Deadline(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Stops a training after the step at which ``is_over`` returns true."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self._is_over()


def _run_rungs(
    record: SearchRecord,
    trials: _Trials,
    candidates: Sequence[Candidate],
    path: Path,
    progress: Callable[[str], None],
    seconds: Callable[[], float],
) -> None:
    """Run the remaining trials within the time limit and set the winner; each finished trial is saved."""
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
            progress(
                f"search: {candidate}, {steps} steps: loss {loss:.4g} on held-out rows "
                f"({len(done)} of {len(entered)}, round {number + 1} of {len(record.rungs)})"
            )
        if len(done) < len(entered):
            progress(f"search: the time is over after {len(done)} of {len(entered)} in round {number + 1}")
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
    """Check that a first rung that ran out of time has enough trials; raises ``ConfigError``."""
    if tried < FEWEST_CANDIDATES:
        raise ConfigError(
            f"a search of {record.minutes:g} minutes tried {tried} of {planned} candidates, expected at least "
            f"{FEWEST_CANDIDATES}: this machine became slower than the {record.step_seconds:.2g} s a step that were "
            "measured; give it more minutes"
        )


def _read(path: Path) -> SearchRecord:
    """The record of an interrupted search; raises ``ConfigError``."""
    try:
        return decode_json(path.read_bytes(), SearchRecord)
    except (OSError, msgspec.DecodeError) as error:
        repair = f"remove {path.parent} and start without --resume"
        raise ConfigError(f"{path} is no record of a search: {error}; {repair}") from error


def _write(path: Path, record: SearchRecord) -> None:
    data = msgspec.json.format(msgspec.json.encode(record), indent=2)
    replace_file(path, data, repair="free space and go on with --resume", durable=True)
