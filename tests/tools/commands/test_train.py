"""``adalink train`` as a user runs it: in a process of its own, and as a command in this one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime.storage.adapter import read_adapter
from adalink.tools.cli import main

FILES = ["--base", "b", "--data", "d", "--eval", "e", "--out", "o"]
BOTH = ["--modality", "text", "--modality", "image"]
NO_SPACES = (
    "warning: rows.jsonl: 9 of 9 completions begin without a space behind their prompts (such as 'aaa'): most "
    "tokenizers expect ' a'"
)
REPORT: dict[str, object] = {}

SETTINGS = [
    *("--rank", "8", "--scope", "prompt", "--lr", "0.02", "--batch-size", "4", "--max-length", "16"),
    *("--seed", "3", "--device", "cpu", "--save-steps", "5"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    FAMILIES["llama"]().save_pretrained(folder / "tiny-llama")
    make_tokenizer().save_pretrained(folder / "tiny-llama")
    rows = [json.dumps({"prompt": letter * count, "completion": letter}) for letter in "abc" for count in (2, 3, 4)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "wrong.jsonl").write_text(rows[0] + "\n" + '{"prompt": "x"}')
    return folder


def arguments(out, *extra, data="rows.jsonl"):
    return ["train", "--base", "tiny-llama", "--data", data, "--eval", "rows.jsonl", "--out", out, *SETTINGS, *extra]


def command(out, *extra):
    return [sys.executable, "-m", "adalink.tools", *arguments(out, *extra)]


def call(work, out, *extra):
    """In a process of its own."""
    return subprocess.run(command(out, *extra), cwd=work, capture_output=True, text=True, check=False)


@pytest.fixture
def call_here(work, monkeypatch):
    """The same command in this process."""
    monkeypatch.chdir(work)
    return lambda out, *extra, **options: CliRunner().invoke(main, arguments(out, *extra, **options))


def test_writes_an_adapter_and_prints_its_report_and_a_log_without_bars(work, warm_torch):
    done = warm_torch.run(command("adapter", "--max-steps", "6", "--json"), cwd=work)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    adapter = read_adapter(work / "adapter")
    assert report["adapter_digest"] == adapter.digest
    assert (adapter.config.scope, adapter.config.rank) == ("prompt", 8)
    assert report["base"] == "tiny-llama"
    assert "\r" not in done.stderr
    assert "Warning" not in done.stderr
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    said = [line for line in done.stderr.splitlines() if line not in steps]
    assert said == [
        NO_SPACES,
        "warning: rows.jsonl: 9 of 9 eval rows have prompts of training rows: what is measured there is memory",
        "loading tiny-llama",
        "exact match of the base on 9 eval rows",
        "training on 9 rows, 6 steps",
        "exact match of the adapter on 9 eval rows",
        "evaluation page: adapter/evaluation.html",
    ]
    assert [line.split(",")[0] for line in steps] == [f"step {number} of 6" for number in range(1, 7)]
    assert re.fullmatch(r"step 4 of 6, loss [0-9.]+, eval loss [0-9.]+, 0:0[0-9] left", steps[3])


def test_prints_one_line_without_json(call_here):
    done = call_here("logged", "--max-steps", "6")
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_bias_dropout_init_and_precision_are_trained_with(work, call_here):
    first = ("--max-steps", "6", "--json")
    runs = [
        call_here(f"first-{number}", *first, *more)
        for number, more in enumerate(([], ["--dropout", "0.5"], ["--init", "centered"]))
    ]
    digests = {json.loads(done.stdout)["adapter_digest"] for done in runs}
    assert len(digests) == 3
    done = call_here("third", *first, "--bias", "--dropout", "0.25", "--precision", "bfloat16")
    report = json.loads(done.stdout)
    assert (report["method"]["bias"], report["method"]["dropout"]) == (True, 0.25)
    assert report["settings"]["precision"] == "bfloat16"
    assert {"text.down.bias", "text.up.bias"} < set(read_adapter(work / "third").weights)


def test_wrong_row_is_a_message_and_exit_code_2(work, call_here):
    done = call_here("none", "--max-steps", "6", data="wrong.jsonl")
    assert done.exit_code == 2
    assert "wrong.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (work / "none").exists()


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        ([], 64),
        (["--rank", "8"], 8),
        ([*BOTH, "--rank", "text=8", "--rank", "image=9"], {"text": 8, "image": 9}),
        (["--rank", "text=8"], {"text": 8}),
    ],
)
def test_ranks_of_modalities(monkeypatch, given, rank):
    chosen = []
    monkeypatch.setattr("adalink.training.run.train", lambda *values, **options: chosen.append(values[4]) or REPORT)
    monkeypatch.setattr("adalink.tools.preflight.training.check_training", lambda *values, **options: None)
    done = CliRunner().invoke(main, ["train", *FILES, *given, "--json"])
    assert done.exit_code == 0, done.stderr
    assert chosen[0].rank == rank


@pytest.mark.parametrize(
    ("row", "typed", "rate"),
    [
        ({"prompt": "ab", "completion": "c"}, [], None),
        ({"text": "ab", "label": "c"}, [], 0.5),
        ({"prompt": "ab", "completion": "c"}, ["--head-lr", "0.25"], 0.25),
    ],
)
def test_a_default_of_the_head_asks_for_no_labels(monkeypatch, tmp_path, row, typed, rate):
    """It is for all trainings; on the command line it is for this one, and rows without labels are an error then."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    heads = []
    monkeypatch.setenv("ADALINK_TRAIN_HEAD_LR", "0.5")
    monkeypatch.setattr("adalink.training.run.train", lambda *_, **options: heads.append(options["head"]) or REPORT)
    monkeypatch.setattr("adalink.tools.preflight.training.check_training", lambda *values, **options: None)
    given = ["--base", "b", "--data", str(tmp_path / "rows.jsonl"), "--out", "o", *typed, "--json"]
    done = CliRunner().invoke(main, ["train", *given])
    assert done.exit_code == 0, done.stderr
    assert (None if heads[0] is None else heads[0].lr) == rate


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rank", "many"], "--rank is many, expected one number, or MODALITY=NUMBER for each modality"),
        (["--rank", "8", "--rank", "16"], "--rank is 8 16, expected one number, or MODALITY=NUMBER"),
        (["--rank", "text=8", "--rank", "text=16"], "--rank is text=8 text=16, expected each modality once"),
        (["--rank", "text=8", "--rank", "image=16"], "rank is for text, image and the modalities are text"),
        (["--rank", "0"], "rank is 0, expected a whole number of at least 1"),
        (["--rank", "0", "--soft-tokens", "4", "--dropout", "0.5"], "rank is 0 with dropout 0.5: a soft prompt alone"),
        (["--dropout", "1"], "dropout is 1.0, expected a chance of at least 0 and less than 1"),
        (["--precision", "float16"], "'float16' is not one of 'float32', 'bfloat16'"),
    ],
)
def test_wrong_settings_are_a_message_and_exit_code_2(given, message):
    done = CliRunner().invoke(main, ["train", *FILES, *given])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.slow
def test_killed_run_is_resumed_to_the_same_adapter(work):
    steps = ("--max-steps", "400")
    whole = call(work, "whole", *steps)
    assert whole.returncode == 0, whole.stderr
    child = subprocess.Popen(command("killed", *steps), cwd=work, stderr=subprocess.DEVNULL)
    checkpoints = work / "killed.checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (work / "killed").exists()
    assert call(work, "killed", *steps).returncode == 2  # not started over by accident
    resumed = call(work, "killed", *steps, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert read_adapter(work / "killed").digest == read_adapter(work / "whole").digest
    assert not checkpoints.exists()
