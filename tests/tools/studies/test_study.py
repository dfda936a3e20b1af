"""``adalink study`` on a tiny base: chosen on validation, done once, resumed, and read with suspicion."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from study_support import METHODS, die, fail_first_rate, study_text, write_base, write_data

from adalink.runtime.errors import BackendError, DataError
from adalink.tools.cli import main
from adalink.tools.studies import plan, schedule
from adalink.tools.studies.plan import Estimates, make_cells, open_runs, waiting
from adalink.tools.studies.schedule import do_runs, read_finished
from adalink.training.config import INITS
from adalink.training.study.settings import AdaLinkMethod, read_study


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return write_base(folder / "tiny-llama"), write_data(folder / "letters")


def write_study(places, folder, methods=METHODS, **changes):
    path = folder / "study.toml"
    path.write_text(study_text(*places, methods, **changes))
    return path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, ["study", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
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


def contents(out):
    return {path.name: json.loads(path.read_text()) for path in (out / "runs").iterdir()}


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
    finished = read_finished(copy[1])
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


def test_an_interrupted_study_keeps_what_was_done(places, tmp_path, monkeypatch):
    study, count, real = write_study(places, tmp_path), [0], schedule.perform

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(schedule, "perform", interrupted)
    invoke(study, "--out", tmp_path / "out", code=130)
    assert len(contents(tmp_path / "out")) == 2
    assert not list((tmp_path / "out" / "runs").glob(".*"))


def test_processes_give_what_one_process_gives(done, tmp_path):
    study = read_study(done[0])
    cells, lines, finished = make_cells(study), [], {}
    assert do_runs(cells, tmp_path, finished, jobs=2, say=lines.append)
    assert len(lines) == 7
    ours, theirs = contents(tmp_path), contents(done[1])
    assert ours.keys() == theirs.keys() == finished.keys()
    for name in ours:
        assert ours[name]["result"]["accuracy"] == pytest.approx(theirs[name]["result"]["accuracy"], abs=0.05)
        assert ours[name]["result"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_killed_process_is_told(done, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "perform", die)
    with pytest.raises(BackendError, match=r"a worker process was killed, .*use fewer --jobs"):
        do_runs(make_cells(read_study(done[0])), tmp_path, {}, jobs=2)


@pytest.mark.parametrize(("replaced", "sign", "ending", "code"), [
    ("stay_with_second_seed", r"\[ .* min\]", signal.SIGINT, 130),
    ("stay_with_second_seed", r"\[ .* min\]", signal.SIGKILL, -signal.SIGKILL),
    ("stay_or_fail", "the runs that are under way are finished first", signal.SIGINT, 130),
], ids=["Ctrl-C", "killed", "Ctrl-C after a failure"])  # fmt: skip
def test_workers_end_with_the_study(places, tmp_path, replaced, sign, ending, code):
    """Ctrl-C, which reaches every process of a terminal, is a line; and a study that is killed leaves none waiting.

    Of the two workers one has a run under way, and one has none left.
    """
    lora = METHODS[METHODS.index('[[methods]]\nname = "LoRA 2"') : METHODS.index('[[methods]]\nname = "none"')]
    study = write_study(places, tmp_path, lora, compare_to="LoRA 2")
    program = (
        "import signal\n"  # which a shell that starts the tests in its background lets its programs ignore
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from study_support import {replaced}\n"
        "from adalink.tools.cli import main\n"
        "from adalink.tools.studies import schedule\n"
        f"schedule.perform = {replaced}\n"
        f"main(['study', {str(study)!r}, '--out', {str(tmp_path / 'out')!r}, '--jobs', '2'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    said = b""
    try:
        while not re.search(sign, said.decode()) and select.select([process.stderr], [], [], 240)[0]:
            said += os.read(process.stderr.fileno(), 4096) or pytest.fail(said.decode())
        time.sleep(0.5)
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)
        else:
            process.kill()
        said += process.communicate(timeout=60)[1]  # until no process holds stderr
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = said.decode()
    assert process.returncode == code, said
    assert "Traceback" not in said
    if ending == signal.SIGINT:
        assert said.splitlines()[-1] == "Interrupted."  # and no word of semaphores that were left


def test_a_failed_run_does_not_lose_what_runs_beside_it(done, tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "perform", fail_first_rate)
    finished = {}
    with pytest.raises(DataError, match="planted"):
        do_runs(make_cells(read_study(done[0])), tmp_path, finished, jobs=2)
    (content,) = contents(tmp_path).values()  # AdaLink's other rate was on its way and ended later
    assert content["run"]["lr"] == 1e-3
    assert finished.keys() == contents(tmp_path).keys()


def test_no_run_begins_that_would_end_too_late(places, done, copy, tmp_path):
    study, out = write_study(places, tmp_path, seeds=[1, 3]), copy[1]
    result = invoke(study, "--out", out, "--minutes", 0, "--json")
    assert "time is up: 2 runs are left" in result.stderr
    assert json.loads(result.stdout)["runs"]["open"] == 2
    for path in (out / "runs").iterdir():  # what was measured says that a run takes an hour
        content = json.loads(path.read_text())
        content["result"] |= {"train_seconds": 3600.0}
        path.write_text(json.dumps(content))
    assert "2 runs are left" in invoke(study, "--out", out, "--minutes", 30).stderr
    assert len(contents(out)) == 7


def test_a_dry_run_lists_and_does_nothing(places, done, tmp_path):
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


def test_estimates(done):
    cells = make_cells(read_study(done[0]))
    (run, *_), lora, zero = cells[0].choose, cells[1].finals[0], cells[2].finals[0]
    base = cells[0].base
    assert Estimates([], [base]).seconds(run) is None
    declared = type(base)(name=base.name, model=base.model, seconds_per_step=6.0)
    assert Estimates([], [declared]).seconds(run) == pytest.approx(6 * 6.0 + 15 * 6.0 / 12)
    assert Estimates([], [declared]).seconds(zero) == pytest.approx(24 * 6.0 / 12)
    measured = [
        {"run": {"base": "tiny", "device": "cpu", "method": {"kind": "adalink"}, "max_steps": 10},
         "result": {"train_seconds": seconds, "score_seconds": 5.0, "rows": 10}}
        for seconds in (20.0, 30.0, 100.0)
    ]  # fmt: skip
    assert Estimates(measured, [declared]).seconds(run) == pytest.approx(6 * 3.0 + 15 * 0.5)
    measured.append(json.loads(json.dumps(measured[0]).replace("adalink", "lora").replace("20.0", "70.0")))
    assert Estimates(measured, [declared]).seconds(lora) == pytest.approx(12 * 7.0 + 24 * 0.5)
    measured[2]["run"]["precision"] = "bfloat16"
    assert Estimates(measured, [declared]).seconds(run) == pytest.approx(6 * 2.5 + 15 * 0.5)
    measured[0]["run"]["device"] = measured[1]["run"]["device"] = measured[2]["run"]["device"] = "cuda"
    assert Estimates(measured, [declared]).seconds(run) == pytest.approx(6 * 7.0 + 15 * 0.5)


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
