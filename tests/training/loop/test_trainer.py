"""What the Trainer is given: the loss of a completion, and one schedule for trainings, searches and studies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision_families import disturb
from torch import nn
from transformers import Trainer

from adalink.training.data.batches import pad_decoder, pad_encoder_decoder
from adalink.training.data.rows import TrainingRow, encode_rows
from adalink.training.loop.trainer import TrainableAdapters, trainer_arguments
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import input_embedding
from adalink.training.settings import TrainSettings


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


ROWS = [TrainingRow("abcab", "x"), TrainingRow("bb", "yzz"), TrainingRow("c", "y")]


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
