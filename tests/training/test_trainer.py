"""What the Trainer is given: the loss of a completion, and one schedule for trainings, searches and studies."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from attach_support import disturb
from tiny_models import FAMILIES
from tiny_tokenizer import make_tokenizer
from torch import nn
from transformers import Trainer

from adalink.training.adalink import AdaLink
from adalink.training.attach import attach
from adalink.training.base_model import input_embedding
from adalink.training.config import AdaLinkConfig
from adalink.training.dataset import Row, encode_rows, pad_decoder, pad_encoder_decoder
from adalink.training.settings import TrainSettings
from adalink.training.trainer import TrainableAdapters, make_optimizer, trainer_arguments


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
    moved = _after_steps(make_optimizer(module, arguments, ratio)[0], module, 1)
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
    moved = _after_steps(make_optimizer(ours, arguments, 1.0)[0], ours, 5)
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted)


def test_both_rates_rise_and_fall_alike(tmp_path: Path) -> None:
    arguments = trainer_arguments(tmp_path, TrainSettings(lr=1e-2, max_steps=40, device="cpu"))
    module = _Parts()
    trainer = Trainer(model=module, args=arguments, optimizers=make_optimizer(module, arguments, 10.0))
    trainer.create_optimizer_and_scheduler(num_training_steps=40)
    rates = []
    for _ in range(40):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[2] == pytest.approx([1e-2, 1e-3])
    assert all(fast == pytest.approx(10 * slow) for fast, slow in rates)


ROWS = [Row("abcab", "x"), Row("bb", "yzz"), Row("c", "y")]


@pytest.mark.parametrize("scope", ["all", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_loss_is_that_of_the_completion_by_hand(family: str, scope: str) -> None:
    model, tokenizer = FAMILIES[family](), make_tokenizer()
    examples = encode_rows(ROWS, tokenizer, 24, "rows")
    with attach(model, AdaLinkConfig(rank=4, scope=scope)) as attached, torch.no_grad():
        disturb(attached)
        loss = TrainableAdapters(attached)(**pad_decoder(examples, pad=2))["loss"]
        adapter = attached.adapters["text"]
    total, count, everything = 0.0, 0, 0.0
    with torch.no_grad():
        for example in examples:  # one row at a time, without padding, over embeddings
            plain = input_embedding(model)(torch.tensor([example.prompt + example.target]))
            embeds = adapter(plain)
            if scope == "prompt":
                embeds[:, len(example.prompt) :] = plain[:, len(example.prompt) :]
            likely = model(inputs_embeds=embeds).logits[0].log_softmax(dim=-1)
            for place, token in enumerate(example.target):
                total -= float(likely[len(example.prompt) - 1 + place, token])
                count += 1
            ids = example.prompt + example.target
            everything -= sum(float(likely[place, ids[place + 1]]) for place in range(len(example.prompt) - 1))
    assert float(loss) == pytest.approx(total / count, abs=1e-4)
    assert abs(everything) > 1  # what a loss on the prompt would have added


def test_loss_of_an_encoder_decoder_by_hand() -> None:
    model, tokenizer = FAMILIES["t5"](), make_tokenizer()
    examples = encode_rows(ROWS, tokenizer, 24, "rows")
    with attach(model, AdaLinkConfig(rank=4)) as attached, torch.no_grad():
        disturb(attached)
        loss = TrainableAdapters(attached)(**pad_encoder_decoder(examples, pad=0))["loss"]
        total, count = 0.0, 0
        for example in examples:
            embeds = attached.adapters["text"](model.shared(torch.tensor([example.prompt])))
            inputs = torch.tensor([[0, *example.target[:-1]]])
            likely = model(inputs_embeds=embeds, decoder_input_ids=inputs).logits[0].log_softmax(dim=-1)
            total -= sum(float(likely[place, token]) for place, token in enumerate(example.target))
            count += len(example.target)
    assert float(loss) == pytest.approx(total / count, abs=1e-4)
