"""A short run of each part of the harness, and proof that it finds what it is there to find."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import campaign, kills, page, threads
from fuzz.corpus import make_corpus
from fuzz.kinds import KINDS, generator_of
from fuzz.mutations import VALUES, mutate_json
from fuzz.outcomes import BAD, observe
from helpers.paths import REPOSITORY

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import RequestError

# Checkpoints and GGUF files need transformers, whose import and loading alone take as long as all others.
QUICK = sorted(name for name in KINDS if name not in ("hf", "gguf"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("fuzz") / "corpus")


def test_no_input_gives_anything_but_an_answer_or_a_typed_error(corpus: Path, tmp_path: Path) -> None:
    totals = campaign.run(corpus, tmp_path / "work", inputs=150, names=QUICK, keep=tmp_path / "failed")
    assert totals.failures == []
    assert totals.inputs == 150
    assert totals.counts.keys() == set(QUICK)
    assert totals.of("typed") > 60
    assert totals.of("same") > 5
    assert totals.of("accepted") > 5


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_input_is_made_again_from_its_seed(name: str, corpus: Path, tmp_path: Path) -> None:
    made = [KINDS[name](corpus, tmp_path / name).make(generator_of(name, seed)) for seed in (3, 3, 4, 5)]
    assert made[0] == made[1]
    assert any(files != made[0] for files in made[2:])
    assert list(tmp_path.iterdir()) == []


def test_an_input_does_not_depend_on_those_made_before_it() -> None:
    """A value from the list was once changed in place, until it held itself and nothing could be made of it."""
    data, seeds = b'{"a": [1, {"b": 2}], "c": "d"}', range(1000)
    before = repr(VALUES)
    made = [mutate_json(generator_of("", seed), data) for seed in seeds]
    assert [mutate_json(generator_of("", seed), data) for seed in seeds] == made
    assert repr(VALUES) == before


def raise_bug() -> Any:
    raise KeyError("a bug")


@pytest.mark.parametrize(
    ("call", "is_vouched", "kind"),
    [
        (raise_bug, False, "untyped"),
        (lambda: (_ for _ in ()).throw(RequestError("refused")), False, "typed"),
        (lambda: (_ for _ in ()).throw(RequestError("")), False, "untyped"),
        (lambda: 1, False, "accepted"),
        (lambda: 1, True, "altered"),
        (lambda: {"logits": np.array([1.0, np.nan])}, False, "malformed"),
        (lambda: sys.exit(0), False, "untyped"),
    ],
)
def test_outcomes_have_their_classes(call: Any, is_vouched: bool, kind: str) -> None:
    assert observe(call, "another", is_vouched=is_vouched).kind == kind


def test_crashes_and_hangs_are_counted_and_the_next_input_is_answered(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker process is stopped from outside: first ended, then held."""
    monkeypatch.setattr(campaign, "IDLE_LIMIT_SECONDS", 1.0)
    worker = campaign.Worker(corpus, tmp_path / "work")
    assert worker.answer("adapter", 1)[0].kind in ("typed", "same", "accepted")
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGSEGV)
    time.sleep(0.2)
    crashed = worker.answer("adapter", 2)[0]
    assert (crashed.kind, crashed.detail[:8]) == ("crash", "SIGSEGV:")
    assert worker.answer("adapter", 2)[0].kind not in BAD
    os.kill(worker._process.pid, signal.SIGSTOP)
    assert worker.answer("adapter", 3)[0].kind == "hang"
    assert worker.answer("adapter", 3)[0].kind not in BAD
    worker.close()


def test_a_killed_writer_leaves_the_old_or_the_new_deployment(corpus: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks a child for each kill."""
    report, names = tmp_path / "kills.json", ("adapter", "replace", "remove")
    command = [sys.executable, "-m", "fuzz", "kills", "--kills", "6", "--corpus", str(corpus), "--json", str(report)]
    paths = os.pathsep.join(str(REPOSITORY / name) for name in ("tests", "src", "."))
    done = subprocess.run(
        [*command, *(word for name in names for word in ("--change", name))],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["faults"] == []
    assert found["kills"] == 6


def test_a_writer_that_is_not_atomic_is_found(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a change that spoils a file in place, and takes long over it."""

    def spoil(folder: Path) -> None:
        path = folder / "base/onnxruntime-cpu/model.onnx.data"
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        time.sleep(0.05)
        path.write_bytes(data)

    planted = kills.Change("planted", spoil, 1)
    monkeypatch.setattr(kills, "changes", lambda corpus: [planted])
    counted = kills.run_kills(corpus, tmp_path, 3)
    assert any("model.onnx.data has" in fault["fault"] for fault in counted.faults)


def test_sixty_four_threads_get_the_bits_of_one(corpus: Path) -> None:
    figures = threads.run_threads(corpus / "text" / "deployment", each=4)
    assert figures["differing"] == []
    assert (figures["threads"], figures["requests"]) == (64, 256)


def test_threads_that_share_what_they_must_not_are_found(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a call that runs with the arguments of whichever call began last."""
    last: dict[str, Any] = {}
    run = Deployment.run

    def run_last(self: Deployment, **arguments: Any) -> Any:
        last["arguments"] = arguments
        time.sleep(0.001)
        return run(self, **last["arguments"])

    monkeypatch.setattr(Deployment, "run", run_last)
    assert threads.run_threads(corpus / "text" / "deployment", threads=16, each=6)["differing"]


def test_page_shows_the_committed_figures() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert f"{page.BEGIN}\n\n{page.tables(page.read_figures())}\n\n{page.END}" in text
    assert {f"`{name}`" for name in KINDS} <= set(re.findall(r"`[^`\n]+`", text.partition("## What may happen")[0]))


def test_reports_of_inputs_are_added() -> None:
    classes = dict.fromkeys(campaign.CLASSES, 0)
    first = {"seed": 5, "inputs": 3, "seconds": 1.5, "classes": classes | {"typed": 3}, "failures": []}
    then = {"seed": 8, "inputs": 2, "seconds": 2.5, "classes": classes | {"same": 1, "hang": 1}, "failures": [{}]}
    kinds = {"file": {"inputs": 2, "typed": 2, "slowest_ms": 9}, "hf": {"inputs": 1, "typed": 1, "slowest_ms": 4}}
    more = {"file": {"inputs": 2, "same": 1, "hang": 1, "slowest_ms": 7}}
    found = page.add([first | {"kinds": kinds}, then | {"kinds": more}])
    assert (found["seed"], found["inputs"], found["seconds"], found["failures"]) == (5, 5, 4.0, [{}])
    assert found["classes"] == classes | {"typed": 3, "same": 1, "hang": 1}
    assert found["kinds"]["file"] == {"inputs": 4, "typed": 2, "same": 1, "hang": 1, "slowest_ms": 9}
    assert found["kinds"]["hf"] == kinds["hf"]


def test_reports_of_kills_are_added() -> None:
    one = {"kills": 3, "seconds": 1.0, "changes": {"base": {"before": 2, "after": 1, "too late": 4}}, "faults": []}
    found = page.add_kills([one, one | {"kills": 1, "changes": {"engine": {"before": 1}}, "faults": [{}]}])
    changes = {"base": {"before": 2, "after": 1, "too late": 4}, "engine": {"before": 1}}
    assert found == {"kills": 4, "seconds": 2.0, "changes": changes, "faults": [{}]}


def test_figures_of_a_failed_run_say_so() -> None:
    kind = {"inputs": 3, "typed": 1, "untyped": 2, "slowest_ms": 7}
    classes = dict.fromkeys(campaign.CLASSES, 0) | {"typed": 1, "untyped": 2}
    inputs = {"seed": 5, "inputs": 3, "seconds": 1.0, "classes": classes, "kinds": {"file": kind}, "failures": 2}
    said = page.tables({"inputs": inputs})
    assert "| file | 3 | 1 | 0 | 0 | 2 | 7 |" in said
    assert "| all | 3 | 1 | 0 | 0 | 2 |  |" in said
    assert "Of anything else: 2 untyped, 0 altered" in said
