"""A slower ``down`` is that and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer

from adalink.training.loop.trainer import trainer_arguments
from adalink.training.method.adalink import AdaLink
from adalink.training.settings import TrainSettings
from studies.experiment.optimizer import make_optimizer


class _Parts(nn.Module):
    """Two bottlenecks, one of them with biases, a soft prompt, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"text": AdaLink(6, 3, "gelu", bias=True), "image": AdaLink(6, 2)})
        self.soft_prompt = nn.Parameter(torch.zeros(2, 6))
        self.frozen = nn.Linear(3, 2).requires_grad_(False)


def _after_steps(optimizer: torch.optim.Optimizer, module: nn.Module, count: int) -> dict[str, torch.Tensor]:
    """How far each trained parameter has gone after so many steps along seeded gradients."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    draw = torch.Generator().manual_seed(5)
    for _ in range(count):
        for value in trained.values():
            value.grad = torch.randn(value.shape, generator=draw)
        optimizer.step()
    return {name: value.detach() - before[name] for name, value in trained.items()}


@pytest.mark.parametrize("ratio", [10.0, 4.0, 0.5])
def test_a_first_step_moves_down_by_its_own_rate(tmp_path: Path, ratio: float) -> None:
    arguments = trainer_arguments(tmp_path, TrainSettings(lr=1e-2, device="cpu"))
    module = _Parts()
    moved = _after_steps(make_optimizer(module, arguments, ratio), module, 1)
    assert len(moved) == 7
    for name, change in moved.items():  # AdamW's first step is the rate, whatever the gradient
        rate = 1e-2 / ratio if ".down." in name else 1e-2
        torch.testing.assert_close(change.abs(), torch.full_like(change, rate), rtol=1e-3, atol=1e-7)


def test_at_a_ratio_of_one_the_optimizer_is_the_trainers_own(tmp_path: Path) -> None:
    """To the last bit, so that runs of studies done before there was a ratio stand."""
    arguments = trainer_arguments(tmp_path, TrainSettings(lr=1e-2, device="cpu"))
    torch.manual_seed(4)
    ours = _Parts()
    theirs = copy.deepcopy(ours)
    plain = Trainer(model=theirs, args=arguments).create_optimizer()
    wanted = _after_steps(plain, theirs, 5)
    moved = _after_steps(make_optimizer(ours, arguments, 1.0), ours, 5)
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted)


def test_both_rates_rise_and_fall_alike(tmp_path: Path) -> None:
    arguments = trainer_arguments(tmp_path, TrainSettings(lr=1e-2, max_steps=40, device="cpu"))
    module = _Parts()
    trainer = Trainer(model=module, args=arguments, optimizers=(make_optimizer(module, arguments, 10.0), None))
    trainer.create_optimizer_and_scheduler(num_training_steps=40)
    rates = []
    for _ in range(40):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[2] == pytest.approx([1e-2, 1e-3])
    assert all(fast == pytest.approx(10 * slow) for fast, slow in rates)
