"""What the Trainer is given: one schedule for trainings, searches and studies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from adalink.training.settings import TrainSettings
from adalink.training.trainer import trainer_arguments


@pytest.mark.parametrize(("steps", "warmup"), [(200, 10), (50, 2), (7, 0)])
def test_the_rate_rises_for_a_twentieth_and_falls_to_zero(tmp_path: Path, steps: int, warmup: int) -> None:
    settings = TrainSettings(lr=3e-3, max_steps=steps, batch_size=5, seed=13, device="cpu")
    trainer = Trainer(model=nn.Linear(3, 2), args=trainer_arguments(tmp_path, settings))
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    optimizer, rates = trainer.optimizer, []
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        trainer.lr_scheduler.step()
    rising = [3e-3 * step / warmup for step in range(warmup)]
    falling = [3e-3 * (steps - step) / (steps - warmup) for step in range(warmup, steps + 1)]
    assert rates == pytest.approx([*rising, *falling])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * len(optimizer.param_groups)


@pytest.mark.parametrize(("steps", "between"), [(200, 10), (45, 2), (7, 1)])
def test_what_is_said_on_the_way(tmp_path: Path, steps: int, between: int) -> None:
    settings = TrainSettings(lr=3e-3, max_steps=steps, batch_size=5, seed=13, device="cpu")
    arguments = trainer_arguments(tmp_path, settings, save_steps=4)
    assert (arguments.max_steps, arguments.logging_steps, arguments.save_steps) == (steps, between, 4)
    assert (arguments.per_device_train_batch_size, arguments.seed) == (5, 13)
    assert arguments.device == torch.device("cpu")
    assert arguments.train_batch_size == 5, "on several GPUs too: hooks know one"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_a_gpu_either_precision_is_for_the_cpu(tmp_path: Path, device: str, precision: str) -> None:
    arguments = trainer_arguments(tmp_path, TrainSettings(device=device, precision=precision))
    assert arguments.device == torch.device("cpu")
    assert arguments.bf16 is (precision == "bfloat16")
