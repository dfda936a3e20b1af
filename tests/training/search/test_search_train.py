"""Training with a search before it, from Python and from the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers.search import ROWS, make_rows
from helpers.studies import write_base
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime.errors import ConfigError, DataError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.rows import TrainingRow, encode_rows
from adalink.training.loop.options import LoopOptions
from adalink.training.method.config import AdaLinkConfig
from adalink.training.run import train
from adalink.training.search import search as search_module
from adalink.training.settings import SearchSettings, TrainSettings


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
SHORT = TrainSettings(lr=0.5, max_steps=12, batch_size=8, max_length=24, seed=3, device="cpu")
CONFIG = AdaLinkConfig(rank=4)


def run(work, out, space=ENOUGH, data="train", evaluated="eval", config=CONFIG, settings=SHORT, **options):
    files = (work / f"{data}.jsonl", work / f"{evaluated}.jsonl")
    return train(work / "tiny-llama", *files, out, config, settings, space=space, loop=LoopOptions(**options))


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
        [TrainingRow(**json.loads(x)) for x in (work / "eval.jsonl").read_text().split("\n")], make_tokenizer(), 24, ""
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
        if sum("steps: loss" in line for line in told) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(work, out, progress=stop)
    with pytest.raises(ConfigError, match="go on with --resume"):
        run(work, out)
    with pytest.raises(ConfigError, match="the interrupted run had other search"):
        run(work, out, SearchSettings(minutes=31, rates=(2e-2, 1e-6), ranks=(16, 8)), resume=True)
    with pytest.raises(ConfigError, match=r"the interrupted run had other search: .*, now None; resume with the same"):
        run(work, out, None, resume=True)
    resumed = run(work, out, resume=True, progress=told.append)
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

    monkeypatch.setattr("adalink.training.run.train", record)
    monkeypatch.setattr("adalink.tools.preflight.training.check_training", lambda *arguments, **options: None)

    def call(*options):
        arguments = ["train", "--base", "b", "--data", "d", "--eval", "e", "--out", "o", *options]
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert call("--search", "7", "--rank", "16", "--activation", "tanh").exit_code == 0
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    assert seen.space == SearchSettings(minutes=7, rates=rates, ranks=(16,), activations=("tanh",))
    assert seen.config.init == "gradient"
    call("--search", "2", "--lr", "0.003")  # the default, but given
    assert seen.space == SearchSettings(minutes=2, rates=(3e-3,))
    assert seen.config.init == "kaiming"
    call("--rank", "16")
    assert seen.space is None
    assert (seen.config.init, seen.settings.lr) == ("kaiming", 3e-3)
    call("--rank", "0", "--soft-tokens", "4", "--search", "2")
    assert (seen.config.init, seen.space.rates) == ("kaiming", (3e-3, 1e-2, 1e-3, 3e-2))
    call("--init", "gradient")
    assert (seen.config.init, seen.settings.lr) == ("gradient", 1e-3)
    call("--init", "kaiming", "--search", "2")
    assert (seen.config.init, seen.settings.lr) == ("kaiming", 3e-3)
    assert seen.space == SearchSettings(minutes=2)
    call("--init", "centered")
    assert (seen.config.init, seen.settings.lr) == ("centered", 3e-4)
    call("--search", "2", "--init", "centered")
    assert seen.space == SearchSettings(minutes=2, rates=(3e-4, 1e-3, 1e-4, 3e-3))
    call("--init", "centered", "--lr", "0.02")
    assert seen.settings.lr == 2e-2
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
    assert {trial["candidate"]["lr"] for trial in report["search"]["trials"]} == {1e-3, 3e-3, 1e-2, 3e-2}
    assert done.stderr.count("loss") >= 4
    assert "is trained on all 80 rows" in done.stderr
