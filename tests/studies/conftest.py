"""A small study that was done, and the made-up runs of one whose figures are worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from helpers.studies import METHODS, invoke, made_result, study_text, write_base, write_data, write_study

from studies.experiment.run_settings import Run
from studies.experiment.settings import Study, describe_method
from studies.plan import Cell

ACCURACY = {
    ("letters", "AdaLink 8"): {1: 0.80, 2: 0.90},
    ("letters", "AdaLink 16"): {1: 0.85, 2: 0.91},
    ("letters", "LoRA 2"): {1: 0.90, 2: 0.92},
    ("letters", "none"): {0: 0.25},
    ("digits", "AdaLink 8"): {1: 0.50, 2: 0.50},
    ("digits", "AdaLink 16"): {1: 0.55, 2: 0.53},
    ("digits", "LoRA 2"): {1: 0.60},
    ("digits", "none"): {0: 0.125},
}
MORE = """
[[methods]]
name = "AdaLink 16"
kind = "adalink"
rank = 16
activation = "gelu"
lr = [1e-2]
compare_to = "AdaLink 8"
"""


@pytest.fixture
def made():
    """A study of two data sets, its cells and its finished runs; LoRA's seed 2 on digits is not done."""
    text = study_text(Path("base"), Path("data"), METHODS + MORE, compare_to="LoRA 2", description="<b>made up</b>")
    second = '[[data]]\nname = "digits"\nfolder = "more"\n'
    study = msgspec.toml.decode(text + second, type=Study)
    cells, finished = [], {}
    for data in study.data:
        for method in study.methods:
            accuracy = ACCURACY[data.name, method.name]
            rate = 0.0 if method.name == "none" else 1e-2
            finals = [
                Run(purpose="final", base="tiny", base_digest="b", data=data.name, words=32, train_digest="t",
                    scored_digest="s", scored_rows=24, method=describe_method(method), size=None, lr=0.0, max_steps=12,
                    batch_size=4, seed=seed, device="cpu")
                for seed in ([0] if method.name == "none" else [1, 2])
            ]  # fmt: skip
            choose = ()
            if method.name == "AdaLink 8":
                choose = tuple(msgspec.structs.replace(finals[0], purpose="choose", lr=lr) for lr in (1e-2, 1e-3))
                for run in choose:
                    finished[run.file_name] = made_result(run, run.lr, method.name)
            cells.append(Cell(study.bases[0], data, (), method, None, choose, tuple(finals)))
            for run in finals:
                if run.seed in accuracy:
                    run = msgspec.structs.replace(run, lr=rate)
                    finished[run.file_name] = made_result(run, accuracy[run.seed], method.name)
    return study, cells, finished


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return write_base(folder / "tiny-llama"), write_data(folder / "letters")


@pytest.fixture(scope="session")
def done(places, tmp_path_factory):
    """A finished study of seven runs: AdaLink's two to choose a rate, and two, two and one to measure."""
    folder = tmp_path_factory.mktemp("done")
    study = write_study(places, folder)
    result = invoke(study, "--out", folder / "out", "--json")
    return study, folder / "out", json.loads(result.stdout), result.stderr


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done[1], tmp_path / "out")
    return done[0], tmp_path / "out"
