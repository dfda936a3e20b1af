"""How the runs of a study are done: in processes, within a time, and as far as they come."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from helpers.studies import METHODS, contents, die, fail_first_rate, invoke, write_study

from adalink.runtime.errors import BackendError, DataError
from studies import schedule
from studies.experiment.settings import read_study
from studies.plan import Estimates, make_cells
from studies.schedule import do_runs


@pytest.fixture(scope="module")
def warm_workers():
    """Workers are forked from a fresh process that has their imports, in place of doing those themselves.

    The tests of Ctrl-C start them as a study does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.studies", "studies.schedule"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule.multiprocessing, "get_context", lambda method: context)
        yield


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


def test_processes_give_what_one_process_gives(done, tmp_path, warm_workers):
    study = read_study(done[0])
    cells, lines, finished = make_cells(study), [], {}
    assert do_runs(cells, tmp_path, finished, jobs=2, progress=lines.append)
    assert len(lines) == 7
    ours, theirs = contents(tmp_path), contents(done[1])
    assert ours.keys() == theirs.keys() == finished.keys()
    for name in ours:
        assert ours[name]["result"]["accuracy"] == pytest.approx(theirs[name]["result"]["accuracy"], abs=0.05)
        assert ours[name]["result"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_killed_process_is_told(done, tmp_path, monkeypatch, warm_workers):
    monkeypatch.setattr(schedule, "perform", die)
    with pytest.raises(BackendError, match=r"a worker process was killed, .*use fewer --jobs"):
        do_runs(make_cells(read_study(done[0])), tmp_path, {}, jobs=2)


@pytest.mark.parametrize(("replaced", "sign", "ending", "code"), [
    pytest.param("stay_with_second_seed", r"\[ .* min\]", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(
        "stay_with_second_seed", r"\[ .* min\]", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow
    ),
    pytest.param(
        "stay_or_fail", "the runs that are under way are finished first", signal.SIGINT, 130, marks=pytest.mark.slow
    ),
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
        f"from helpers.studies import {replaced}\n"
        "from studies.commands import main\n"
        "from studies import schedule\n"
        f"schedule.perform = {replaced}\n"
        f"main(['run', {str(study)!r}, '--out', {str(tmp_path / 'out')!r}, '--jobs', '2'])\n"
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


def test_a_failed_run_does_not_lose_what_runs_beside_it(done, tmp_path, monkeypatch, warm_workers):
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
