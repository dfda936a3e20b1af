"""``python -m studies run`` on a tiny base: chosen on validation, done once, resumed, and read with suspicion."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.studies import METHODS, contents, invoke, study_text, write_base, write_data, write_study

from adalink.training.method.config import INITS
from studies import plan, schedule
from studies.experiment.settings import AdaLinkMethod, read_study
from studies.plan import make_cells, open_runs, waiting
from studies.run_store import read_runs


def test_runs_keep_their_names(monkeypatch):
    """A name that changes has finished runs done again; what AdaLink did not know then must not change it."""
    monkeypatch.setattr(plan, "open_base", lambda model: SimpleNamespace(digest="sha256:0"))
    monkeypatch.setattr(plan, "choose_scored", lambda *arguments: [1])
    monkeypatch.setattr(plan, "digest_rows", lambda *arguments: "sha256:1")
    study = SimpleNamespace(training=SimpleNamespace(batch_size=8, precision="float32"), parts=lambda entry: ())
    base, entry = SimpleNamespace(name="b", model="m"), SimpleNamespace(name="d", words=3)

    def name(**method):
        run = plan._run(
            study, base, entry, None, AdaLinkMethod(name="x", lr=(1e-2,), **method), "final", 5, "cpu",
            train_digest="t", size=None, seed=1, lr=1e-2, max_steps=9,
        )  # fmt: skip
        return run.file_name

    assert name(rank=16, activation="identity") == "final-be4e91e3225f9b0001d20b0a.json"
    gelu = name(rank=64, activation="gelu")
    assert gelu == name(rank=64, activation="gelu", tokens=0) == "final-21aae14bf9ea2165c7110aed.json"
    inits = {name(rank=64, activation="gelu", init=init) for init in INITS}
    assert len(inits) == len(INITS)
    assert gelu == name(rank=64, activation="gelu", init="kaiming")
    assert gelu == name(rank=64, activation="gelu", compare_to="y")
    assert gelu == name(rank=64, activation="gelu", lr_ratio=1.0) != name(rank=64, activation="gelu", lr_ratio=10.0)
    assert name(rank=64, tokens=3) not in (name(rank=64), name(rank=64, tokens=4), gelu)
    study.training.precision = "bfloat16"
    assert name(rank=64, activation="gelu") != gelu


def test_the_runs_are_those_declared(done):
    runs = [(c["run"]["purpose"], c["run"]["method"]["kind"], c["run"]["lr"], c["run"]["seed"], c["run"]["max_steps"],
             c["run"]["scored_rows"], c["result"]["rows"]) for c in contents(done[1]).values()]  # fmt: skip
    chosen = next(cell["lr"] for cell in done[2]["cells"] if cell["method"] == "AdaLink 8")
    assert sorted(runs) == sorted([
        ("choose", "adalink", 1e-2, 99, 6, 15, 15), ("choose", "adalink", 1e-3, 99, 6, 15, 15),
        ("final", "adalink", chosen, 1, 12, 24, 24), ("final", "adalink", chosen, 2, 12, 24, 24),
        ("final", "lora", 1e-2, 1, 12, 24, 24), ("final", "lora", 1e-2, 2, 12, 24, 24),
        ("final", "zero-shot", 0.0, 0, 0, 24, 24),
    ])  # fmt: skip


def test_the_best_rate_on_validation_is_the_one_measured(done):
    choose = [c for c in contents(done[1]).values() if c["run"]["purpose"] == "choose"]
    best = max(choose, key=lambda c: (c["result"]["accuracy"], -c["result"]["loss"]))
    (cell,) = [cell for cell in done[2]["cells"] if cell["method"] == "AdaLink 8"]
    assert cell["lr"] == best["run"]["lr"]
    assert cell["lr_at_edge"]


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ({"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.6, "loss": 3.0}, 1),
        ({"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.5, "loss": 3.0}, 0),
        ({"accuracy": 0.9, "loss": None}, {"accuracy": 0.9, "loss": 3.0}, 1),
        ({"accuracy": 0.9, "loss": 1.0, "diverged": True}, {"accuracy": 0.1, "loss": 3.0}, 1),
        ({"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.5, "loss": 2.0}, 1),  # the lower rate
    ],
)
def test_how_a_rate_is_chosen(done, first, second, winner):
    cell = make_cells(read_study(done[0]))[0]
    assert [run.lr for run in cell.choose] == [1e-2, 1e-3]
    results = [{"diverged": False, **values} for values in (first, second)]
    finished = {run.file_name: {"result": result} for run, result in zip(cell.choose, results, strict=True)}
    assert cell.chosen(finished) == cell.choose[winner].lr
    assert {run.lr for run in cell.measured(finished)} == {cell.choose[winner].lr}
    finished.popitem()
    assert cell.chosen(finished) is None
    assert cell.measured(finished) == []
    assert [run for _, run in waiting([cell], finished)] == list(cell.finals)


def test_a_finished_study_does_nothing_and_says_the_same(done, copy, monkeypatch):
    def never(*arguments):
        raise AssertionError("a finished run was done again")

    monkeypatch.setattr(schedule, "perform", never)
    study, out = copy
    assert json.loads(invoke(study, "--out", out, "--json").stdout) == done[2]


def test_only_what_is_missing_is_done(done, copy):
    study, out = copy
    lost = sorted(path for path in (out / "runs").iterdir() if path.name.startswith("final"))[1]
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir() if path != lost}
    content = json.loads(lost.read_text())
    lost.unlink()
    invoke(study, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads(lost.read_text())
    assert again["run"] == content["run"]
    for name in ("accuracy", "loss", "loss_curve"):
        assert again["result"][name] == content["result"][name]


def test_other_settings_and_other_data_are_other_runs(places, done, copy, tmp_path):
    names = {run.file_name for _, run in open_runs(make_cells(read_study(done[0])), {})}
    changed = write_study(places, tmp_path, seeds=[1, 3])
    finished = read_runs(copy[1])
    left = [(cell.method.name, run.seed) for cell, run in open_runs(make_cells(read_study(changed)), finished)]
    assert left == [("AdaLink 8", 3), ("LoRA 2", 3)]
    data = tmp_path / "letters"
    shutil.copytree(places[1], data)
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace('"text": "', '"text": "!')]))
    study = tmp_path / "other.toml"
    study.write_text(study_text(places[0], data, METHODS))
    other = {run.file_name for _, run in open_runs(make_cells(read_study(study)), {})}
    zero_shot = {name for name in names if finished[name]["run"]["method"]["kind"] == "zero-shot"}
    assert names & other == zero_shot  # what learns nothing does not depend on the training rows


def test_a_method_may_be_run_with_some_sizes(places, tmp_path):
    methods = METHODS.replace("rank = 2\n", 'rank = 2\nsizes = ["all"]\n')
    study = write_study(places, tmp_path, methods, sizes=[8, "all"])
    cells = make_cells(read_study(study))
    assert [(cell.method.name, cell.size) for cell in cells] == [
        ("AdaLink 8", 8), ("none", None), ("AdaLink 8", None), ("LoRA 2", None)
    ]  # fmt: skip
    everything = {run.file_name for cell in cells if cell.size is None for run in (*cell.choose, *cell.finals)}
    plain = make_cells(read_study(write_study(places, tmp_path)))
    assert everything == {run.file_name for cell in plain for run in (*cell.choose, *cell.finals)}


def test_what_is_not_compared_is_said(places, done, tmp_path):
    """A data set, or a size, on which the study does not run the method that others are paired with."""
    assert done[2]["not_compared"] == []
    methods = METHODS.replace("rank = 2\n", 'rank = 2\nsizes = ["all"]\n')
    other = f'\n[[data]]\nname = "more"\nfolder = "{places[1]}"\nmethods = ["AdaLink 8", "none"]\n'
    study = write_study(places, tmp_path, methods + other, sizes=[8, "all"], compare_to="LoRA 2")
    out = tmp_path / "out"
    text = " ".join(invoke(study, "--out", out, "--minutes", 0).stdout.split())
    missing = [("letters", 8), ("more", 8), ("more", "all")]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["not_compared"] == [
        {"base": "tiny", "data": data, "size": size, "against": "LoRA 2"} for data, size in missing
    ]
    line = (
        "Nothing is paired with LoRA 2 on letters (tiny, rows: 8), more (tiny, rows: 8), more (tiny, rows: all): the "
        "study does not run it there."
    )
    assert line in text
    for name in ("study.md", "study.html"):
        assert line in " ".join((out / name).read_text().split())


def test_one_for_all(places, tmp_path):
    other = write_data(tmp_path / "ends", seed=6, labels={"x": "ant", "y": "yes", "z": "no"})
    more = f"""
[[data]]
name = "ends"
folder = "{other}"
methods = ["AdaLink 8"]

[[data]]
name = "both"
combine = ["letters", "ends"]
methods = ["AdaLink 8", "LoRA 2"]
"""
    methods = METHODS.replace("lr = [1e-2, 1e-3]", "lr = [1e-2]")
    study = write_study(places, tmp_path, methods + more, seeds=[1])
    result = invoke(study, "--out", tmp_path / "out")
    assert "one for each data set, and one for all" in result.stdout
    runs = contents(tmp_path / "out").values()
    assert sorted((c["run"]["data"], c["run"]["method"]["kind"], c["run"]["max_steps"]) for c in runs) == [
        ("both", "adalink", 24), ("both", "lora", 24), ("ends", "adalink", 12),
        ("letters", "adalink", 12), ("letters", "lora", 12), ("letters", "zero-shot", 0),
    ]  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {tuple(pooled["data"]) for pooled in summary["overall"]} == {("letters",)}
    alone = {(c["run"]["data"], c["run"]["method"]["kind"]): c["result"] for c in runs}
    shared = {(pair["data"], pair["method"]): pair for pair in summary["shared"]}
    assert shared.keys() == {(data, name) for data in ("letters", "ends") for name in ("AdaLink 8", "LoRA 2")}
    ours = shared["ends", "AdaLink 8"]
    assert ours["alone"]["mean"] == alone["ends", "adalink"]["accuracy"]
    assert ours["together"]["mean"] == alone["both", "adalink"]["part_accuracy"]["ends"]
    assert ours["parameters_alone"] == 2 * ours["parameters_together"] == 2 * 2 * 8 * 48
    assert (shared["ends", "LoRA 2"]["alone"], shared["ends", "LoRA 2"]["parameters_alone"]) == (None, None)
    assert shared["letters", "LoRA 2"]["alone"]["mean"] == alone["letters", "lora"]["accuracy"]


def test_a_dry_run_lists_and_does_nothing(places, done, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    study = write_study(places, tmp_path)
    listed = json.loads(invoke(study, "--out", tmp_path / "out", "--dry-run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    declared = tmp_path / "declared.toml"
    declared.write_text(study.read_text().replace("[[bases]]", "[[bases]]\nseconds_per_step = 60.0"))
    assert re.search(r"about \d+ minutes with 1 at once", invoke(declared, "--out", tmp_path, "--dry-run").stderr)
    assert [(row["purpose"], row["lr"], row["seed"]) for row in listed["runs"]] == [
        ("choose", 1e-2, 99), ("choose", 1e-3, 99), ("final", 1e-2, 1), ("final", 1e-2, 2), ("final", None, 0),
        ("final", None, 1), ("final", None, 2),
    ]  # fmt: skip
    assert listed["minutes"] is None
    text = invoke(study, "--out", tmp_path / "out", "--dry-run")
    assert "to be chosen" in text.stdout
    assert "how long they take is not known" in text.stderr
    assert "tiny, letters, AdaLink 8, all rows" in text.stdout


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_row_that_a_base_has_no_positions_for_is_refused_before_the_first_run(places, tmp_path, split):
    data = shutil.copytree(places[1], tmp_path / "letters")
    lines = (data / f"{split}.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "text": "a" * 60})
    (data / f"{split}.jsonl").write_text("\n".join(lines))
    methods = METHODS.replace('activation = "gelu"', "tokens = 5")
    study = write_study((write_base(tmp_path / "tiny-bert", "bert"), data), tmp_path, methods)
    message = invoke(study, "--out", tmp_path / "out", code=2).stderr
    assert "data set letters: 'aaa" in message
    assert "takes up to 65 positions, 5 of them a soft prompt's, and BertModel has 64" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no finished run: .*remove it"),
        (lambda text: "[]", "is no finished run"),
        (lambda text: text.replace('"seed": 1', '"seed": 5'), "holds the run final-.*expected the run that it is"),
        (lambda text: text.replace('"accuracy"', '"accuracies"'), "without its measurements"),
    ],
)
def test_a_damaged_run_is_named(copy, damage, message):
    study, out = copy
    path = next(p for p in sorted((out / "runs").iterdir()) if '"seed": 1,' in p.read_text())
    path.write_text(damage(path.read_text()))
    error = invoke(study, "--out", out, code=2).output
    assert path.name in error
    assert re.search(message, error), error


def test_the_summary_is_on_disk_and_on_the_terminal(done, copy):
    study, out = copy
    assert json.loads((out / "summary.json").read_text()) == done[2]
    text = invoke(study, "--out", out).stdout
    assert "AdaLink 8" in text
    assert "differences in accuracy, seed by seed" in text
    assert not re.search(r"[\"'(]/(tmp|home|root)/", (out / "summary.json").read_text())


@pytest.mark.slow  # training itself warns too, and is tested so
@pytest.mark.parametrize("is_supported", [True, False])
def test_bfloat16_that_a_cpu_has_not_is_warned_of(places, tmp_path, monkeypatch, is_supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    study = write_study(places, tmp_path)
    study.write_text(study.read_text().replace("batch_size = 4\n", 'batch_size = 4\nprecision = "bfloat16"\n'))
    said = invoke(study, "--out", tmp_path / "out", "--dry-run").stderr
    assert ("has no instructions for bfloat16" in said) != is_supported
    invoke(study, "--out", tmp_path / "out")
    assert "bfloat16" not in invoke(study, "--out", tmp_path / "out").stderr, "nothing is left to do"
