"""The search for rate, rank and activation: what it chooses, what it never sees, and that it ends in time."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.search import ROWS, make_rows
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime.errors import ConfigError, DataError
from adalink.training.data.batches import pad_decoder, pad_encoder_decoder
from adalink.training.data.rows import TrainingRow, encode_rows
from adalink.training.loop.trainer import TrainableAdapters, collator
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.search import search as search_module
from adalink.training.search.plan import Candidate, Trial, list_candidates, plan_rungs, rank_trials, split_rows
from adalink.training.search.search import _read, search
from adalink.training.settings import SearchSettings, TrainSettings

CONFIG = AdaLinkConfig(rank=4)
SETTINGS = TrainSettings(lr=0.5, max_steps=32, batch_size=8, max_length=24, seed=3, device="cpu")
RATES = SearchSettings(minutes=20, rates=(1e-6, 2e-2, 1e-4, 1e-5), ranks=(16,), activations=("identity",))


class Clock:
    """A clock that only the base moves: every pass takes as long as the rate at that moment says."""

    def __init__(self, monkeypatch):
        self.now, self.passes, self.seconds_a_pass = 0.0, 0, 1.0
        predict = TrainableAdapters._predict

        def slow(module, labels, inputs):
            self.now += self.seconds_a_pass
            self.passes += 1
            return predict(module, labels, inputs)

        monkeypatch.setattr(TrainableAdapters, "_predict", slow)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"]()


def look(model, folder, clock, space=RATES, rows=ROWS, settings=SETTINGS, **options):
    tokenizer = make_tokenizer()
    examples = encode_rows(rows, tokenizer, settings.max_length, "rows")
    collate = collator(model, tokenizer, None)
    return search(model, rows, examples, collate, CONFIG, settings, space, folder, clock=clock, **options)


def test_finds_the_rate_that_is_clearly_best(model, clock, tmp_path):
    config, settings, report = look(model, tmp_path, clock)
    assert (settings.lr, config.rank, config.activation) == (2e-2, 16, "identity")
    losses = {trial["candidate"]["lr"]: trial["loss"] for trial in report["trials"]}
    assert losses[2e-2] < 0.5 * report["loss_before"]
    assert losses[1e-6] == pytest.approx(report["loss_before"], rel=0.01)
    assert (settings.seed, settings.max_steps, config.scope) == (SETTINGS.seed, SETTINGS.max_steps, CONFIG.scope)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_worst_is_not_called_the_best(model, clock, tmp_path, monkeypatch):
    """The test above can fail: with the order of the losses turned round it would."""
    ranked = rank_trials
    monkeypatch.setattr(search_module, "rank_trials", lambda trials: ranked(trials)[::-1])
    assert look(model, tmp_path, clock, settings=replace(SETTINGS, max_steps=12))[1].lr != 2e-2


def test_later_rounds_are_longer_and_have_the_better_half(model, clock, tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr(search_module, "plan_rungs", lambda *given: planned.append(given) or plan_rungs(*given))
    space = SearchSettings(minutes=2, rates=RATES.rates, ranks=(16,), activations=("identity",))
    _, settings, report = look(model, tmp_path, clock, space)
    rungs = report["rungs"]
    assert [count for count, _ in rungs] == [4, 2]
    assert rungs[1][1] == 2 * rungs[0][1] <= SETTINGS.max_steps
    first, second = ([t for t in report["trials"] if t["steps"] == steps] for _, steps in rungs)
    best = sorted(first, key=lambda trial: trial["loss"])[:2]
    assert [trial["candidate"] for trial in second] == [trial["candidate"] for trial in best]
    assert settings.lr == min(second, key=lambda trial: trial["loss"])["candidate"]["lr"]
    # Measured 4 steps and the rows held out once, then the trials: the clock counts one second a pass.
    looks = math.ceil(report["validation_rows"] / SETTINGS.batch_size)
    assert report["step_seconds"] == 1.0
    assert report["validation_seconds"] == looks
    assert planned == [(4, 120, 4 + looks, 1.0, looks, SETTINGS.max_steps)]  # what measuring took is spent
    assert report["seconds"] == 4 + looks + sum(trial["steps"] + looks for trial in report["trials"])
    assert report["seconds"] <= 2 * 60


def test_ends_in_time_where_steps_become_slower(model, clock, tmp_path):
    space = SearchSettings(minutes=2, rates=RATES.rates, ranks=(16,), activations=("identity",))
    lines = []

    def slow_down(line):
        lines.append(line)
        if "(4 of 4, round 1 of 2)" in line:
            clock.seconds_a_pass = 5.0

    _, settings, report = look(model, tmp_path, clock, space, progress=slow_down)
    assert clock.now <= 2 * 60 + 5.0 * (1 + report["validation_seconds"])  # ends with a step, or a look
    assert "search: the time is over after 0 of 2 in round 2" in lines
    assert [trial["steps"] for trial in report["trials"]] == [report["rungs"][0][1]] * 4
    assert settings.lr == min(report["trials"], key=lambda trial: trial["loss"])["candidate"]["lr"]


def test_too_slow_for_three_candidates_is_an_error(model, clock, tmp_path):
    def slow_down(line):
        clock.seconds_a_pass = 200.0

    with pytest.raises(ConfigError, match=r"of 20 minutes tried 0 of 4 candidates.*the 1 s a step that were measured"):
        look(model, tmp_path, clock, progress=slow_down)


@pytest.mark.slow
def test_interrupted_and_gone_on_with_is_as_uninterrupted(model, monkeypatch, tmp_path):
    space = SearchSettings(minutes=3, rates=(1e-6, 2e-2, 1e-4), ranks=(16, 4), activations=("identity",))
    names = ("whole", "parts")
    for name in names:
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        whole = look(model, tmp_path / "whole", Clock(patch), space)
    count = len(whole[2]["trials"])
    assert len(whole[2]["rungs"]) > 1
    passes = 0
    for stop in (1, 4, count - 1, None):
        with monkeypatch.context() as patch:
            clock, told = Clock(patch), []

            def progress(line, stop=stop, told=told):
                told.append(line)
                done = len(json.loads((tmp_path / "parts/search.json").read_text())["trials"])
                if stop is not None and done >= stop:
                    raise KeyboardInterrupt

            if stop is None:
                parts = look(model, tmp_path / "parts", clock, space, progress=progress)
            else:
                with pytest.raises(KeyboardInterrupt):
                    look(model, tmp_path / "parts", clock, space, progress=progress)
            passes += clock.passes
    assert parts[:2] == whole[:2]
    assert parts[2] == whole[2]
    looks = math.ceil(whole[2]["validation_rows"] / SETTINGS.batch_size)
    assert passes == 4 + looks + sum(trial["steps"] + looks for trial in whole[2]["trials"])  # nothing twice
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        assert look(model, tmp_path / "parts", clock, space) == parts
        assert clock.passes == 0


@pytest.mark.slow
def test_a_candidate_that_diverges_loses(model, clock, tmp_path, monkeypatch):
    row_losses = TrainableAdapters.row_losses

    def spoil(module, **inputs):
        losses = row_losses(module, **inputs)
        return losses * math.nan if module.adapters["text"].down.out_features == 16 else losses

    monkeypatch.setattr(TrainableAdapters, "row_losses", spoil)
    space = SearchSettings(minutes=40, rates=(2e-2, 1e-6), ranks=(16, 4), activations=("identity",))
    config, settings, report = look(model, tmp_path, clock, space)
    assert (config.rank, settings.lr) == (4, 2e-2)
    assert [trial["loss"] is None for trial in report["trials"]].count(True) == 2
    assert json.loads((tmp_path / "search.json").read_text(), parse_constant=pytest.fail)
    (tmp_path / "search.json").unlink()
    with pytest.raises(ConfigError, match=r"tried 2 candidates and all diverged.*a lower --lr"):
        look(model, tmp_path, clock, SearchSettings(minutes=40, rates=(2e-2, 1e-6), ranks=(16,), activations=("tanh",)))


def test_equal_losses_go_to_the_lower_rank_then_the_lower_rate():
    def trial(lr, rank, loss):
        return Trial(Candidate(lr, rank, "gelu"), 8, loss, 1.0)

    trials = [trial(1e-2, 16, 0.5), trial(3e-3, 16, 0.5), trial(1e-1, 4, 0.5), trial(1e-3, 64, 0.4), trial(1, 1, None)]
    ranked = [(choice.lr, choice.rank) for choice in rank_trials(trials)]
    assert ranked == [(1e-3, 64), (1e-1, 4), (3e-3, 16), (1e-2, 16)]


def test_rows_held_out_are_a_seeded_tenth_and_stand_on_one_side_only():
    rows = make_rows(400)
    rows += rows[:50]
    learned, held = split_rows(rows, seed=1)
    assert len(held) == 40
    assert split_rows(rows, seed=1) == (learned, held)
    assert split_rows(rows, seed=2) != (learned, held)
    assert not {rows[index] for index in learned} & {rows[index] for index in held}
    assert {rows[index] for index in learned} | {rows[index] for index in held} == set(rows)
    assert len(split_rows(make_rows(32), 0)[1]) == 16
    prompts = [TrainingRow(str(number), "x") for number in range(5000)]
    assert len(split_rows(prompts, 0)[1]) == 200
    with pytest.raises(DataError, match=r"at least 32 different rows, 16 of them to choose by, and the data has 31"):
        split_rows(make_rows(31) * 4, 0)


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_fits_and_is_the_largest_that_does(seed):
    draw = random.Random(seed)
    candidates, longest = draw.randint(2, 40), draw.choice([1, 7, 40, 200])
    step, check, spent = draw.uniform(0.01, 3), draw.uniform(0, 20), draw.uniform(0, 30)
    budget = draw.uniform(0, 60 * 60)

    def cost(rungs):
        return spent + sum(count * (steps * step + check) for count, steps in rungs)

    try:
        rungs = plan_rungs(candidates, budget, spent, step, check, longest)
    except ConfigError as error:
        minutes = float(re.search(r"at least ([\d.e+]+) minutes", str(error))[1])
        assert minutes > budget / 60
        assert len(plan_rungs(candidates, 60 * minutes, spent, step, check, longest)) >= 1
        with pytest.raises(ConfigError):
            plan_rungs(candidates, 60 * (minutes - 0.02), spent, step, check, longest)
        return
    counts, steps = zip(*rungs, strict=True)
    assert cost(rungs) <= budget
    assert min(candidates, 3) <= counts[0] <= candidates
    assert steps[0] >= longest / 8
    assert sorted(set(steps)) == list(steps)
    assert steps[0] <= math.ceil(longest / 4)
    assert counts[-1] == 2 or steps[-1] == longest
    assert all(later == max(2, math.ceil(count / 2)) for count, later in pairwise(counts))
    assert all(later == min(2 * few, longest) for few, later in pairwise(steps))
    if cost(rungs) < 0.2 * budget:  # there was time for much more
        assert (counts[0], steps[0], steps[-1]) == (candidates, math.ceil(longest / 4), longest)


def test_little_time_goes_to_the_first_candidates_all_rates_of_one_rank():
    space = SearchSettings(minutes=1)
    candidates = list_candidates(space, hidden_size=48)
    assert {choice.rank for choice in candidates} == {16, 4}
    assert [choice.lr for choice in candidates[:4]] == list(space.rates)
    assert len({(choice.rank, choice.activation) for choice in candidates[:4]}) == 1
    assert len(candidates) == len(set(candidates)) == 16


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_row_losses_are_means_over_each_row(family):
    model, tokenizer = FAMILIES[family](), make_tokenizer()
    examples = encode_rows(
        [TrainingRow("abcab", "x"), TrainingRow("bb", "yzz"), TrainingRow("c", "y")], tokenizer, 24, "rows"
    )
    pad = pad_decoder if family == "llama" else pad_encoder_decoder
    with attach(model, AdaLinkConfig(rank=4)) as attached:
        module = TrainableAdapters(attached).eval()
        with torch.no_grad():
            module.adapters["text"].up.weight.normal_(generator=torch.Generator().manual_seed(5))
            alone = [float(module(**pad([example], 0))["loss"]) for example in examples]
        together = module.row_losses(**pad(examples, 0))
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"minutes": 0}, "search minutes are 0, expected more than 0"),
        ({"minutes": math.nan}, "search minutes are nan"),
        ({"minutes": math.inf}, "search minutes are inf"),
        ({"minutes": 1, "rates": (1e-3,), "ranks": (4,), "activations": ("gelu",)}, "leave out at least one of --lr"),
    ],
)
def test_settings_refuse(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SearchSettings(**wrong)


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b'{"minutes": 1e400}', b'{"minutes": "\xff"}'])
def test_a_damaged_record_of_a_search_is_refused(tmp_path, data):
    path = tmp_path / "search.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"search\.json is no record of a search: .* start without --resume"):
        _read(path)
