"""The search for rate, rank and activation: what it chooses, what it never sees, and that it ends in time."""

from __future__ import annotations

import json
import math
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from study_support import write_base
from tiny_models import FAMILIES
from tiny_tokenizer import make_tokenizer

from adalink.runtime.adapter import read_adapter
from adalink.runtime.errors import ConfigError, DataError
from adalink.training import search as search_module
from adalink.training.attach import attach
from adalink.training.config import AdaLinkConfig
from adalink.training.dataset import Row, encode_rows, pad_decoder, pad_encoder_decoder
from adalink.training.search import search
from adalink.training.search_plan import Candidate, Trial, list_candidates, plan_rungs, rank_trials, split_rows
from adalink.training.settings import SearchSettings, TrainSettings
from adalink.training.train import train
from adalink.training.trainer import TrainableAdapters, collator

CONFIG = AdaLinkConfig(rank=4)
SETTINGS = TrainSettings(lr=0.5, max_steps=32, batch_size=8, max_length=24, seed=3, device="cpu")
RATES = SearchSettings(minutes=20, rates=(1e-6, 2e-2, 1e-4, 1e-5), ranks=(16,), activations=("identity",))


def make_rows(count: int, seed: int = 7) -> list[Row]:
    """Different rows whose completion is the letter that the prompt has most of."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        letter = draw.choice("ab")
        prompt = "".join(draw.choice([letter, letter, letter, "."]) for _ in range(11)) + letter
        rows[prompt] = Row(prompt, letter.upper())
    return list(rows.values())


ROWS = make_rows(80)


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
    assert look(model, tmp_path, clock)[1].lr != 2e-2


def test_later_rounds_are_longer_and_have_the_better_half(model, clock, tmp_path):
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
    assert report["seconds"] == 4 + looks + sum(trial["steps"] + looks for trial in report["trials"])
    assert report["seconds"] <= 2 * 60


def test_ends_in_time_where_steps_become_slower(model, clock, tmp_path):
    space = SearchSettings(minutes=2, rates=RATES.rates, ranks=(16,), activations=("identity",))
    lines = []

    def slow_down(line):
        lines.append(line)
        if "(4 of 4, round 1 of 2)" in line:
            clock.seconds_a_pass = 5.0

    _, settings, report = look(model, tmp_path, clock, space, say=slow_down)
    assert clock.now <= 2 * 60 + 5.0 * (1 + report["validation_seconds"])  # ends with a step, or a look
    assert "search: the time is over after 0 of 2 in round 2" in lines
    assert [trial["steps"] for trial in report["trials"]] == [report["rungs"][0][1]] * 4
    assert settings.lr == min(report["trials"], key=lambda trial: trial["loss"])["candidate"]["lr"]


def test_too_slow_for_three_candidates_is_an_error(model, clock, tmp_path):
    def slow_down(line):
        clock.seconds_a_pass = 200.0

    with pytest.raises(ConfigError, match=r"of 20 minutes tried 0 of 4 candidates.*the 1 s a step that were measured"):
        look(model, tmp_path, clock, say=slow_down)


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

            def say(line, stop=stop, told=told):
                told.append(line)
                done = len(json.loads((tmp_path / "parts/search.json").read_text())["trials"])
                if stop is not None and done >= stop:
                    raise KeyboardInterrupt

            if stop is None:
                parts = look(model, tmp_path / "parts", clock, space, say=say)
            else:
                with pytest.raises(KeyboardInterrupt):
                    look(model, tmp_path / "parts", clock, space, say=say)
            passes += clock.passes
    assert parts[:2] == whole[:2]
    assert parts[2] == whole[2]
    looks = math.ceil(whole[2]["validation_rows"] / SETTINGS.batch_size)
    assert passes == 4 + looks + sum(trial["steps"] + looks for trial in whole[2]["trials"])  # nothing twice
    with monkeypatch.context() as patch:
        clock = Clock(patch)
        assert look(model, tmp_path / "parts", clock, space) == parts
        assert clock.passes == 0


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
    prompts = [Row(str(number), "x") for number in range(5000)]
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
    examples = encode_rows([Row("abcab", "x"), Row("bb", "yzz"), Row("c", "y")], tokenizer, 24, "rows")
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


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    write_base(folder / "tiny-llama")
    splits = {"train": ROWS, "eval": make_rows(12, seed=8), "other": make_rows(9, seed=9), "few": ROWS[:20]}
    for name, rows in splits.items():
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


ENOUGH = SearchSettings(minutes=30, rates=(2e-2, 1e-6), ranks=(16, 8), activations=("identity",))
SHORT = TrainSettings(**{**SETTINGS.__dict__, "max_steps": 12})


def run(work, out, space=ENOUGH, data="train", evaluated="eval", config=CONFIG, settings=SHORT, **options):
    files = (work / f"{data}.jsonl", work / f"{evaluated}.jsonl")
    return train(work / "tiny-llama", *files, out, config, settings, space=space, **options)


def without_times(report):
    trials = [{**trial, "seconds": None} for trial in report["search"]["trials"]]
    return trials, report["search"]["validation_sha256"], report["search"]["winner"], report["adapter_digest"]


@pytest.fixture(scope="module")
def searched(work):
    return run(work, work / "searched")


def test_the_adapter_is_that_of_the_winner_trained_on_all_rows(searched, work, tmp_path):
    winner = searched["search"]["winner"]
    assert searched["settings"]["lr"] == winner["lr"] == 2e-2
    assert searched["method"]["rank"] == read_adapter(work / "searched").config.rank == winner["rank"]
    config = AdaLinkConfig(rank=winner["rank"], activation=winner["activation"])
    direct = run(
        work, tmp_path / "direct", None, config=config, settings=TrainSettings(**{**SHORT.__dict__, "lr": 2e-2})
    )
    assert direct["adapter_digest"] == searched["adapter_digest"]
    assert "search" not in direct
    assert json.loads((work / "searched/training.json").read_text()) == json.loads(json.dumps(searched))
    assert json.loads(json.dumps(searched["search"]["rungs"])) == [[4, 3], [2, 6], [2, 12]]
    assert not (work / "searched.checkpoints").exists()


def test_eval_rows_play_no_part(searched, work, tmp_path, monkeypatch):
    other = run(work, tmp_path / "other", evaluated="other")
    assert without_times(other) == without_times(searched)
    assert other["data"]["eval"] != searched["data"]["eval"]
    # A search that held out eval rows instead would be seen here.
    spied = encode_rows(
        [Row(**json.loads(x)) for x in (work / "eval.jsonl").read_text().split("\n")], make_tokenizer(), 24, ""
    )
    make = search_module._Trials

    def cheat(model, learned, held, *others):
        return make(model, learned, spied, *others)

    monkeypatch.setattr(search_module, "_Trials", cheat)
    assert without_times(run(work, tmp_path / "cheated"))[0] != without_times(searched)[0]


def test_a_run_interrupted_in_its_search_is_resumed(searched, work, tmp_path):
    told = []

    def stop(line):
        told.append(line)
        if len(told) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(work, out, say=stop)
    with pytest.raises(ConfigError, match="go on with --resume"):
        run(work, out)
    with pytest.raises(ConfigError, match="the interrupted run had other search"):
        run(work, out, SearchSettings(minutes=31, rates=(2e-2, 1e-6), ranks=(16, 8)), resume=True)
    with pytest.raises(ConfigError, match=r"the interrupted run had other search: .*, now None; resume with the same"):
        run(work, out, None, resume=True)
    resumed = run(work, out, resume=True, say=told.append)
    assert without_times(resumed) == without_times(searched)
    assert sum("steps: loss" in line for line in told) == 8  # each trial once


@pytest.mark.parametrize(
    ("space", "data", "error", "message"),
    [
        (ENOUGH, "few", DataError, "the data has 20: add rows, or leave out --search"),
        (SearchSettings(minutes=1e-4), "train", ConfigError, r"no time for 3 candidates.*give it at least [\d.]+ min"),
    ],
)
def test_what_cannot_be_searched_leaves_nothing_behind(work, tmp_path, space, data, error, message):
    with pytest.raises(error, match=message):
        run(work, tmp_path / "out", space, data)
    assert list(tmp_path.iterdir()) == []


def test_the_command_searches_what_was_not_given(work, monkeypatch, tmp_path):
    from click.testing import CliRunner

    from adalink.tools.cli import main

    seen = SimpleNamespace()

    def record(*arguments, space, **options):
        seen.space, seen.config, seen.settings = space, arguments[4], arguments[5]
        return {"exact_match": {"adapter": 1, "base": 0}, "data": {"eval": {"rows": 1}}, "loss_curve": [{"loss": 1.0}]}

    monkeypatch.setattr("adalink.training.train.train", record)

    def call(*options):
        arguments = ["train", "--base", "b", "--data", "d", "--eval", "e", "--out", "o", *options]
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert call("--search", "7", "--rank", "16", "--activation", "tanh").exit_code == 0
    assert seen.space == SearchSettings(minutes=7, ranks=(16,), activations=("tanh",))
    call("--search", "2", "--lr", "0.003")  # the default, but given
    assert seen.space == SearchSettings(minutes=2, rates=(3e-3,))
    call("--rank", "16")
    assert seen.space is None
    assert call("--search", "0").exit_code == 2
    refused = call("--search", "2", "--lr", "0.003", "--rank", "2", "--activation", "gelu")
    assert refused.exit_code == 2
    assert "nothing is left to choose" in refused.stderr


def test_the_command_prints_progress_apart_from_the_report(work, tmp_path):
    from click.testing import CliRunner

    from adalink.tools.cli import main

    files = ["--data", str(work / "train.jsonl"), "--eval", str(work / "eval.jsonl"), "--out", str(tmp_path / "out")]
    options = ["--search", "30", "--rank", "8", "--activation", "gelu", "--max-steps", "4", "--device", "cpu"]
    done = CliRunner().invoke(
        main, ["train", "--base", str(work / "tiny-llama"), *files, *options, "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {trial["candidate"]["rank"] for trial in report["search"]["trials"]} == {8}
    assert {trial["candidate"]["lr"] for trial in report["search"]["trials"]} == set(SearchSettings(minutes=1).rates)
    assert done.stderr.count("loss") >= 4
    assert "is trained on all 80 rows" in done.stderr
