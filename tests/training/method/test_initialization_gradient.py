"""Bottlenecks that start along the gradient: beside NumPy's float64 on gradients found without any adapter."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from helpers.studies import write_letter_task
from helpers.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, llama, llava, t5
from helpers.tiny_tokenizer import make_tokenizer
from transformers import TrainerCallback

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.batches import IGNORED_LABEL
from adalink.training.data.rows import Example
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.trainer import TrainableAdapters, collator
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.method.initialization import find_directions, follow_directions, measure_gradients
from adalink.training.models.loading import input_embedding
from adalink.training.run import train
from adalink.training.settings import SearchSettings, TrainSettings

RANK = 5
CONFIG = AdaLinkConfig(rank=RANK, activation="gelu", bias=True, init="gradient")


def examples(count, seed=3):
    draw = random.Random(seed)
    return [
        Example([draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 9))], [draw.randrange(3, VOCAB_SIZE), 2])
        for _ in range(count)
    ]


def with_mean(model):
    """The model with embeddings that share a long mean, as SmolLM2's do."""
    with torch.no_grad():
        input_embedding(model.get_encoder() if model.config.is_encoder_decoder else model).weight += 0.7
    return model


def measured(model, config, rows, batch_size=64, seed=1):
    with attach(model, config) as attached:
        return measured_before(attached, rows, batch_size, seed)


def measured_before(attached, rows, batch_size=64, seed=1):
    module, collate = TrainableAdapters(attached), collator(attached.model, make_tokenizer(), None)
    return measure_gradients(module, attached, rows, collate, batch_size=batch_size, seed=seed)


def follow(attached, rows):
    module, collate = TrainableAdapters(attached), collator(attached.model, make_tokenizer(), None)
    follow_directions(attached, find_directions(module, attached, rows, collate, batch_size=64, seed=1))


def by_hand(model, rows, scope="all"):
    """The gradient of one batch's mean loss by ``M``, float64, from what the embeddings themselves get."""
    batch = collator(model, make_tokenizer(), None)(rows)
    labels = batch.pop("labels")
    source = model.get_encoder() if model.config.is_encoder_decoder else model
    x = input_embedding(source)(batch.pop("input_ids")).detach().requires_grad_(True)
    if model.config.is_encoder_decoder:
        loss = model(inputs_embeds=x, labels=labels, **batch).loss
    else:
        scores = model(inputs_embeds=x, **batch).logits[:, :-1].log_softmax(-1)
        wanted = labels[:, 1:]
        chosen = scores.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2)
        loss = -chosen[wanted != IGNORED_LABEL].mean()
    (gradient,) = torch.autograd.grad(loss, x)
    is_adapted = np.ones(x.shape[:2], bool) if scope == "all" else (labels == IGNORED_LABEL).numpy()
    g, seen = (value.detach().numpy().astype(np.float64)[is_adapted] for value in (gradient, x))
    mean = input_embedding(source).weight.detach().numpy().astype(np.float64).mean(axis=0)
    return (g.T @ seen) @ (np.eye(len(mean)) - np.outer(mean, mean) / (mean @ mean))


@pytest.mark.parametrize(("make", "scope"), [(llama, "all"), (llama, "prompt"), (t5, "all")])
def test_gradient_beside_that_of_the_embeddings(make, scope):
    model, rows = with_mean(make()), examples(20)
    wanted = by_hand(model, rows, scope)
    found = measured(model, AdaLinkConfig(rank=3, scope=scope), rows)["text"]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_batches_add_up_and_a_soft_prompt_stands_before_them():
    model, rows = with_mean(llama()), examples(8)
    alone = measured(model, CONFIG, rows, batch_size=4)["text"]
    drawn = random.Random(1).sample(rows, 8)
    wanted = by_hand(model, drawn[:4]) + by_hand(model, drawn[4:])
    np.testing.assert_allclose(alone.numpy(), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    before = measured(model, AdaLinkConfig(rank=RANK, soft_tokens=3), rows, batch_size=4)["text"]
    assert (before - alone).abs().max() > 1e-3 * alone.abs().max()


def test_down_spans_the_strongest_directions():
    model, rows = with_mean(llama()), examples(20)
    values, right = np.linalg.svd(by_hand(model, rows))[1:]
    assert values[RANK - 1] > 1.05 * values[RANK]  # so that the span is well defined
    with attach(model, CONFIG) as attached:
        follow(attached, rows)
        adapter = attached.adapters["text"]
        down = adapter.down.weight.detach().numpy().astype(np.float64)
        np.testing.assert_allclose(down @ down.T, np.eye(RANK) / 3, atol=1e-6)
        np.testing.assert_allclose(3 * down.T @ down, right[:RANK].T @ right[:RANK], atol=1e-3)
        assert not adapter.up.weight.any()
        assert not adapter.down.bias.any()


def test_rows_are_as_long_as_those_of_the_uniform_start():
    torch.manual_seed(8)
    with attach(llama(), AdaLinkConfig(rank=HIDDEN_SIZE)) as attached:
        uniform = attached.adapters["text"].down.weight.square().sum(dim=1).mean()
        assert uniform.item() == pytest.approx(1 / 3, rel=0.1)


def test_nothing_else_changes():
    model = llama()
    with attach(model, CONFIG) as attached:
        before = {name: value.clone() for name, value in attached.adapters.state_dict().items()}
        torch.manual_seed(6)
        drawn = torch.rand(3)
        torch.manual_seed(6)
        measured_before(attached, examples(9))
        assert torch.equal(torch.rand(3), drawn)
        assert all(torch.equal(value, before[name]) for name, value in attached.adapters.state_dict().items())
        assert all(parameter.grad is None for parameter in (*attached.parameters(), *model.parameters()))
        assert not attached.adapters["text"]._forward_hooks
        follow(attached, examples(9))
        changed = {
            name for name, value in attached.adapters.state_dict().items() if not torch.equal(value, before[name])
        }
        assert changed == {"text.down.weight"}


def test_hooks_are_gone_after_an_error():
    with attach(llama(), CONFIG) as attached:
        with pytest.raises(IndexError):
            measured_before(attached, [Example([VOCAB_SIZE + 5], [4])])
        assert not attached.adapters["text"]._forward_hooks


@pytest.mark.parametrize(("count", "expected"), [(7, 7), (64, 64), (300, 64)])
def test_rows_are_drawn_by_the_seed(monkeypatch, count, expected):
    seen = []
    rows = [Example([3 + index % 40, index % 7 + 3, 5], [4, 2]) for index in range(count)]
    numbers = {id(row): index for index, row in enumerate(rows)}

    def draw(seed):
        seen.clear()
        with attach(llama(), CONFIG) as attached:
            make = collator(attached.model, make_tokenizer(), None)

            def collate(chosen):
                seen.extend(numbers[id(row)] for row in chosen)
                return make(chosen)

            module = TrainableAdapters(attached)
            measure_gradients(module, attached, rows, collate, batch_size=10, seed=seed)
        return list(seen)

    first = draw(1)
    assert len(set(first)) == len(first) == expected
    assert draw(1) == first
    assert draw(2) != first
    if count > expected:
        assert max(first) > count // 2  # files are often sorted by class


def test_an_adapter_without_a_gradient_keeps_its_start():
    torch.manual_seed(2)
    with attach(llava(), AdaLinkConfig(rank=4, modalities=("text", "image"), init="gradient")) as attached:
        before = {name: adapter.down.weight.detach().clone() for name, adapter in attached.adapters.items()}
        gradients = measured_before(attached, examples(6))  # without an image
        assert gradients["text"].any()
        assert not gradients["image"].any()
        follow(attached, examples(6))
        assert torch.equal(attached.adapters["image"].down.weight, before["image"])
        assert not torch.equal(attached.adapters["text"].down.weight, before["text"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(value):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[4, 2] = value
    with (
        attach(model, CONFIG) as attached,
        pytest.raises(ModelError, match=r"gradient at the embeddings \(text\) is not finite.*--init kaiming"),
    ):
        follow(attached, examples(6))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_letter_task(tmp_path_factory.mktemp("work"), "abcd", range(2, 22))


SHORT = TrainSettings(lr=1e-6, max_steps=4, batch_size=8, max_length=24, seed=3, device="cpu", save_steps=2)


def test_training_starts_there(files, tmp_path):
    """At a rate of next to nothing ``down`` ends where it started: along rows of the training data."""
    downs = {}
    for init in ("kaiming", "gradient"):
        train(*files, tmp_path / init, AdaLinkConfig(rank=4, init=init), SHORT, loop=LoopOptions(show_bar=False))
        downs[init] = read_adapter(tmp_path / init).weights["text.down.weight"].astype(np.float64)
    np.testing.assert_allclose(downs["gradient"] @ downs["gradient"].T, np.eye(4) / 3, atol=1e-3)
    assert np.abs(downs["kaiming"] @ downs["kaiming"].T - np.eye(4) / 3).max() > 0.01


def test_a_resumed_training_measures_nothing_anew(files, tmp_path, monkeypatch):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    config = AdaLinkConfig(rank=4, init="gradient")
    whole = train(*files, tmp_path / "whole", config, SHORT, loop=LoopOptions(show_bar=False))
    with pytest.raises(KeyboardInterrupt):
        train(*files, tmp_path / "cut", config, SHORT, loop=LoopOptions(show_bar=False, callbacks=[Interrupt()]))
    monkeypatch.setattr("adalink.training.run.find_directions", None)
    again = train(*files, tmp_path / "cut", config, SHORT, loop=LoopOptions(show_bar=False, resume=True))
    assert again["adapter_digest"] == whole["adapter_digest"]


def test_a_search_measures_once(files, tmp_path, monkeypatch):
    calls, followed = [], []
    monkeypatch.setattr(
        "adalink.training.search.search.find_directions", lambda *a, **k: calls.append(a[2]) or find_directions(*a, **k)
    )
    monkeypatch.setattr(
        "adalink.training.search.search.follow_directions", lambda *a: followed.append(a) or follow_directions(*a)
    )
    space = SearchSettings(minutes=30, rates=(2e-2, 1e-6), ranks=(8, 4), activations=("identity",))
    config = AdaLinkConfig(rank=4, init="gradient")
    report = train(*files, tmp_path / "out", config, SHORT, space=space, loop=LoopOptions(show_bar=False))
    assert len(calls) == 1
    assert len(calls[0]) == report["search"]["learned_rows"] < 80  # the rows held out are not looked at
    assert len(followed) == len(report["search"]["trials"]) + 1
