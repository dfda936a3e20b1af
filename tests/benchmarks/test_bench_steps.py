"""`make bench`: measurements in processes of their own, their schema, and what happens when one goes wrong."""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import bandwidth
from benchmarks.cases import CASES, Case
from benchmarks.figures import check_fields, summary
from benchmarks.peers import common
from benchmarks.peers.make_models import MADE_FROM, in_order, recipes
from benchmarks.process import MeasurementError, run_json
from benchmarks.run import Bench
from benchmarks.scale import QUICK
from benchmarks.store import Store


def python(code):
    return [sys.executable, "-c", code]


def test_the_last_line_counts(tmp_path):
    found = run_json(python("print('noise'); print('{\"a\": 1}')"), 60, tmp_path / "log")
    assert found == {"a": 1}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('no adapter here')", "ended with code 1: ValueError: no adapter here"),
        ("import os; os.kill(os.getpid(), 9)", "ended with code -9: no message"),
        ("print('finished')", "printed no JSON object"),
        ("print('[1]')", "printed list, expected a JSON object"),
        ("", "printed no JSON object"),
        ("import time; time.sleep(60)", "gave no answer in 1 s"),
    ],
)
def test_a_process_that_fails_says_why(code, reason, tmp_path):
    with pytest.raises(MeasurementError) as caught:
        run_json(python(code), 1 if "sleep" in code else 60, tmp_path / "log")
    assert str(caught.value).startswith(reason)


def test_a_missing_environment_is_a_reason(tmp_path):
    with pytest.raises(MeasurementError, match="is not installed; run 'make bench'"):
        run_json([tmp_path / "bin/python", "-c", ""], 60, tmp_path / "log")


class FakeEngine(common.Peer):
    """Greedy "tokens" at a known pace: 2 ms for the prompt, 1 ms a token; each adapter takes 4 MiB."""

    adapters = 4
    packages = ("numpy",)
    steady = True

    def __init__(self, settings):
        self.held, self.calls = [], 0
        FakeEngine.now += 0.25

    @staticmethod
    def folder(settings):
        return settings.work

    def prefill(self):
        FakeEngine.now += 0.002

    def generate(self, new_tokens):
        self.calls += 1
        FakeEngine.now += 0.002 + 0.001 * (new_tokens - 1)
        return [7 if self.steady else self.calls, *range(new_tokens - 1)]

    def weight_bytes(self):
        return 1000

    def switch(self, index):
        FakeEngine.now += 5e-6

    def load(self, index):
        FakeEngine.now += 0.003
        pages = mmap.mmap(-1, 2**22)  # memory that no earlier test has given back
        np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE] = 1
        self.held.append(pages)

    def disk_bytes(self):
        return 5


class Unsteady(FakeEngine):
    steady = False


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time passes only where the engine says so."""
    FakeEngine.now = 0.0
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: FakeEngine.now))


def settings(folder):
    return common.Settings(folder, "kind", "text", [1, 2, 3], 64, 1, 3)


def test_one_driver_measures_every_peer(tmp_path):
    found = common.measure(FakeEngine, settings(tmp_path))
    check_fields(found)
    assert found["engine_load_s"] == pytest.approx(0.25)
    assert found["prefill_ms"] == pytest.approx(2)
    assert found["first_token_ms"] == pytest.approx(2)
    assert found["decode_tok_s"] == pytest.approx(1000)
    assert found["swap_us"] == pytest.approx(5)
    assert found["adapter_load_ms"] == pytest.approx(3)
    assert found["adapter_disk_bytes"] == 5
    assert found["adapter_resident_bytes"] == pytest.approx(2**22, rel=0.1)
    assert found["first_tokens"] == [7, *range(15)]
    assert set(found["versions"]) == {"numpy"}


def test_tokens_that_change_from_run_to_run_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="asked for 64 tokens that begin"):
        common.measure(Unsteady, settings(tmp_path))


def test_fields_are_checked(tmp_path):
    good = common.measure(FakeEngine, settings(tmp_path))
    for change, message in (
        ({"decode_tok_s": None}, "'decode_tok_s' is None"),
        ({"prefill_ms": -1.0}, "'prefill_ms' is -1.0"),
        ({"tokens": 1}, "'tokens' is missing or unknown"),
    ):
        with pytest.raises(MeasurementError, match=message):
            check_fields({**good, **change})
    with pytest.raises(MeasurementError, match="'swap_us' is missing"):
        check_fields({name: value for name, value in good.items() if name != "swap_us"})


def test_medians_over_rounds(tmp_path):
    good = common.measure(FakeEngine, settings(tmp_path))
    rounds = [{**good, "decode_tok_s": value, "swap_us": None, "memory_gb_s": 40.0} for value in (3.0, 100.0, 4.0)]
    found = summary(Case("a", "A", "m", "k", "kit"), rounds)
    assert found["decode_tok_s"] == 4.0
    assert found["rounds"]["decode_tok_s"] == [3.0, 100.0, 4.0]
    assert found["swap_us"] is None


def test_results_are_kept_until_the_key_changes(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    def store(key):
        return Store(tmp_path, key, lambda line: None)

    assert [store("a").get("x", make), store("a").get("x", make), store("b").get("x", make)] == [
        {"value": 1},
        {"value": 1},
        {"value": 2},
    ]


def test_a_failure_is_not_kept(tmp_path):
    store = Store(tmp_path, "key", lambda line: None)

    def fail():
        raise MeasurementError("out of memory")

    with pytest.raises(MeasurementError):
        store.get("x", fail)
    assert store.get("x", lambda: {"value": 1}) == {"value": 1}


def test_names_are_unique_and_pairs_fit():
    names = {case.name: case for case in CASES}
    assert len(names) == len(CASES)
    for case in CASES:
        other = names.get(case.without or "", case)
        assert (other.precision, other.is_slow) == (case.precision, case.is_slow)


def test_what_a_peer_is_made_from_is_made_first():
    needed = [name for case in CASES for name in case.needs]
    assert set(needed) <= set(MADE_FROM) == set(recipes(Path("models"), Path("source")))
    for order in (in_order(needed), in_order(reversed(needed)), in_order(["merged"])):
        for name in order:
            assert set(MADE_FROM[name]) <= set(order[: order.index(name)])


def test_every_peer_that_fails_is_reported_with_its_reason(tmp_path, monkeypatch):
    """No environment for the peers, and a deployment that the kit's own scripts cannot open."""
    deployment = tmp_path / "deployment"
    deployment.mkdir()
    (deployment / "manifest.json").write_text(json.dumps({}))
    (tmp_path / "model").mkdir()
    arguments = argparse.Namespace(
        quick=True,
        deployment=deployment,
        model=str(tmp_path / "model"),
        work=tmp_path / "work",
        peers_python=tmp_path / "none/bin/python",
        threads=1,
    )
    monkeypatch.setattr("benchmarks.run.CASES", [case for case in CASES if case.name in ("kit", "genai", "peft")])
    bench = Bench(arguments)
    assert QUICK.rounds == 1
    found = bench.peers()
    assert set(found) == {"kit", "genai", "peft"}
    assert "ended with code" in found["kit"]["error"]
    assert found["genai"]["error"].startswith("genai-fp32 could not be made: ")
    assert "is not installed" in found["peft"]["error"]
    assert "ended with code" in bench.kit()["error"]
    made = tmp_path / "work/models/genai-fp32/model.onnx"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"of this checkpoint")
    bench._models()
    assert made.exists()
    (tmp_path / "model/weights").write_bytes(b"others")
    bench._models()
    assert not made.exists()  # peers never run another checkpoint than the kit


def test_bandwidth_is_that_of_the_fastest_reduction(monkeypatch):
    slow, fast = 0.3, 0.002
    reductions = tuple(("int64", lambda array, wait=wait: time.sleep(wait)) for wait in (slow, fast, slow))
    monkeypatch.setattr(bandwidth, "_REDUCTIONS", reductions)
    found = bandwidth.measure_bandwidth(2, array_bytes=2**20, rounds=1)
    # Two arrays, read at the same time; a sleep may take longer than asked for, never less.
    assert 2 * 2**20 / slow / 1e9 < found <= 2 * 2**20 / fast / 1e9


def test_bandwidth_counts_until_the_last_thread_has_read(monkeypatch):
    waits = [0.3, 0.001, 0.001]
    monkeypatch.setattr(bandwidth, "_REDUCTIONS", (("int64", lambda array: time.sleep(waits.pop())),))
    assert bandwidth.measure_bandwidth(3, array_bytes=2**20, rounds=1) <= 3 * 2**20 / 0.3 / 1e9


def test_bandwidth_of_the_real_reductions():
    assert 0.01 < bandwidth.measure_bandwidth(1, array_bytes=2**20, rounds=3) < 10_000
