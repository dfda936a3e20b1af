"""Evaluation beside the training: what it measures, that it changes nothing, and which weights early stopping keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.sentences import save_encoder
from helpers.studies import write_base
from helpers.tiny_tokenizer import make_tokenizer
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback

from adalink.runtime.errors import BackendUnavailableError, ConfigError, ModelError
from adalink.runtime.storage.head_spec import SINGLE_LABEL
from adalink.tools.terminal.step_line import describe
from adalink.training.adapter_io import load_adapter
from adalink.training.data.held_out import VALIDATION_SHARE, hold_out
from adalink.training.loop.eval_curve import BestWeights, spread
from adalink.training.loop.loop import TrainingRun
from adalink.training.loop.options import LoopOptions, StepProgress
from adalink.training.loop.reporters import run_of_its_own
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.run import train
from adalink.training.settings import TrainSettings

CONFIG = AdaLinkConfig(rank=8, activation="gelu", dropout=0.2)
SETTINGS = TrainSettings(lr=2e-2, max_steps=8, batch_size=4, max_length=24, seed=3, device="cpu", save_steps=3)
# A rate so high that the loss soon rises again.
STOPPING = replace(SETTINGS, lr=0.3, max_steps=40, eval_steps=2, early_stopping=2)
QUIET: dict[str, Any] = {"show_bar": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": f"{letter * count}=", "completion": letter.upper()} for letter in "abcde" for count in range(2, 8)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(base: Path, data: Path, out: Path, settings: TrainSettings, **options: Any) -> dict[str, Any]:
    return train(base, data, data, out, CONFIG, settings, loop=LoopOptions(**{**QUIET, **options}))


def mean_loss(base: Path, adapter: Path, rows: Sequence[dict[str, str]]) -> float:
    """Mean over rows of the mean loss of a completion's tokens, from the logits of one row at a time."""
    model, tokenizer, losses = load_base(base), make_tokenizer(), []
    with load_adapter(adapter, model), torch.no_grad():
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            target = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            losses.append(float(functional.cross_entropy(logits, torch.tensor(target))))
    return sum(losses) / len(losses)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_curve_is_measured_and_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    """Also the order of rows and the dropout: an evaluation uses no random numbers."""
    with_curve = run(base, data, tmp_path / "with", replace(SETTINGS, eval_steps=3))
    without = run(base, data, tmp_path / "without", replace(SETTINGS, eval_steps=0))
    assert with_curve["adapter_digest"] == without["adapter_digest"]
    assert with_curve["loss_curve"] == without["loss_curve"]
    assert "eval_curve" not in without
    assert [point["step"] for point in with_curve["eval_curve"]] == [3, 6, 8]
    assert with_curve["eval_curve"][-1]["loss"] == pytest.approx(
        mean_loss(base, tmp_path / "with", read(data)), rel=1e-5
    )
    assert with_curve["eval_curve"][0]["loss"] != pytest.approx(with_curve["eval_curve"][-1]["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def stopped(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("stopped") / "adapter"
    return out, run(base, data, out, STOPPING)


def test_early_stopping_keeps_the_best(stopped: tuple[Path, dict[str, Any]], base: Path, data: Path) -> None:
    out, report = stopped
    curve = report["eval_curve"]
    best = min(curve, key=lambda point: point["loss"])
    assert report["best_step"] == best["step"] < curve[-1]["step"] < STOPPING.max_steps
    assert curve[-1]["step"] == best["step"] + 2 * 2
    rows = read(data)
    split = hold_out([row["prompt"] for row in rows], [row["completion"] for row in rows], 3, VALIDATION_SHARE)
    assert report["data"]["validation"] == split.as_record()
    held = [rows[number] for number in split.held_out]
    assert mean_loss(base, out, held) == pytest.approx(best["loss"], rel=1e-5)
    assert mean_loss(base, out, held) < curve[-1]["loss"] - 1e-3


def test_best_that_is_not_restored_is_caught(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BestWeights, "restore", lambda self: None)
    report = run(base, data, tmp_path / "out", STOPPING)
    rows = read(data)
    split = hold_out([row["prompt"] for row in rows], [row["completion"] for row in rows], 3, VALIDATION_SHARE)
    loss = mean_loss(base, tmp_path / "out", [rows[number] for number in split.held_out])
    assert loss > min(point["loss"] for point in report["eval_curve"]) + 1e-3


class Interrupt(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("is_over", [False, True])
def test_resumed_early_stopping_is_as_uninterrupted(
    is_over: bool, stopped: tuple[Path, dict[str, Any]], base: Path, data: Path, tmp_path: Path
) -> None:
    """The best weights are from before the checkpoint; at ``is_over`` the run has ended early, and trains no more."""
    whole = stopped[1]
    last = whole["eval_curve"][-1]["step"]
    interruption: dict[str, Any] = {"stop": Stop(last)} if is_over else {"callbacks": (Interrupt(last - 1),)}
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "out", STOPPING, **interruption)
    assert (tmp_path / f"out.checkpoints/checkpoint-{last}").is_dir() == is_over
    resumed = run(base, data, tmp_path / "out", STOPPING, resume=True)
    for name in ("adapter_digest", "eval_curve", "loss_curve", "best_step"):
        assert resumed[name] == whole[name]


class Stop:
    """Asks to stop after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seen, self.entered = steps, 0, False

    @property
    def is_set(self) -> bool:
        assert self.entered
        self.seen += 1
        return self.seen == self.steps

    def __enter__(self) -> Stop:
        self.entered = True
        return self

    def __exit__(self, *error: object) -> None:
        self.entered = False


def test_stop_saves_the_step_it_ends_in(base: Path, data: Path, tmp_path: Path) -> None:
    whole = run(base, data, tmp_path / "whole", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "out", SETTINGS, stop=Stop(5))
    assert (tmp_path / "out.checkpoints/checkpoint-5/trainer_state.json").is_file()
    steps: list[StepProgress] = []
    resumed = run(base, data, tmp_path / "out", SETTINGS, resume=True, on_step=steps.append)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert [one.step for one in steps] == [6, 7, 8]
    assert steps[-1].evaluation == {"loss": whole["eval_curve"][-1]["loss"]}
    assert (steps[-1].steps, steps[-1].seconds_left) == (8, 0)


def test_a_loss_that_is_never_finite_is_an_error(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the adapter would be that of the start. Nothing stays in the way of the next run."""
    monkeypatch.setattr("adalink.training.run.mean_loss", lambda *_: float("nan"))
    steps: list[StepProgress] = []
    with pytest.raises(ModelError, match="no evaluation had a finite loss"):
        run(base, data, tmp_path / "out", replace(STOPPING, max_steps=4), on_step=steps.append)
    assert describe(steps[-1]).endswith("eval loss nan")
    assert not (tmp_path / "out.checkpoints").exists()


def test_curve_of_a_head_has_its_measure(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "tiny")
    rows = [{"text": f"{word} {number}", "label": word} for word in ("oil", "tin") for number in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = replace(SETTINGS, max_steps=30, eval_steps=15, early_stopping=1)
    report = train(encoder, path, path, tmp_path / "out", CONFIG, settings, loop=LoopOptions(**QUIET))
    assert [set(point) for point in report["eval_curve"]] == [{"step", "loss", "accuracy"}] * len(report["eval_curve"])
    assert report["evaluation"]["accuracy"] > 0.9
    assert report["method"]["head"]["problem_type"] == SINGLE_LABEL


def test_rows_of_a_curve_are_spread() -> None:
    assert spread(5) == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert len(spread(1000)) == 200


def test_best_weights_are_in_checkpoints() -> None:
    module = nn.Linear(2, 1)
    best = BestWeights(module.parameters())
    best.keep_if_better(0.5, 7)
    kept = module.weight.detach().clone()
    nn.init.zeros_(module.weight)
    best.keep_if_better(0.6, 8)
    best.keep_if_better(float("nan"), 9)
    assert {name: value.shape for name, value in best.state_dict().items()} == {
        **{"weight0": (1, 2), "weight1": (1,)},
        **{"step": (), "loss": ()},
    }
    best.restore()
    assert torch.equal(module.weight, kept)
    assert int(best.step) == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eval_steps": -1}, "eval_steps is -1"),
        ({"early_stopping": 0}, "early_stopping is 0 with eval_steps None, expected at least 1"),
        ({"early_stopping": 2, "eval_steps": 0}, "and evaluations to stop by"),
    ],
)
def test_settings_refuse(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**wrong)  # type: ignore[arg-type]


def test_each_training_has_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the caller has begun stays open; one whose training fails is marked as failed."""
    ends: list[int] = []

    def finish(*, exit_code: int) -> None:
        ends.append(exit_code)

    wandb = SimpleNamespace(run=None, finish=finish)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with run_of_its_own("wandb"):
        wandb.run = "begun by the Trainer"
    with run_of_its_own("wandb"), run_of_its_own("none"):
        pass
    wandb.run = None
    with pytest.raises(KeyboardInterrupt), run_of_its_own("wandb"):
        raise KeyboardInterrupt
    assert ends == [0, 1]


def test_a_reporter_that_is_not_there_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adalink.training.loop.reporters.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"wandb needs the package wandb, .*pip install wandb"):
        TrainingRun("tiny", tmp_path / "out", SETTINGS, LoopOptions(report_to="wandb"))
    with pytest.raises(ConfigError, match="report_to is 'paper', expected one of none, tensorboard, wandb"):
        TrainingRun("tiny", tmp_path / "out", SETTINGS, LoopOptions(report_to="paper"))
