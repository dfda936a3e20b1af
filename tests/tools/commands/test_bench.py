"""`adalink bench`: the fixed names, sane values, and that what it compares is what it says."""

import gc
import itertools
import json
import mmap
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.tiny_deployments import make_deployment

from adalink.tools.bench import measure
from adalink.tools.cli import main

NAMES = [
    "prefill_ratio",
    "decode_ratio",
    "swap_hot_us_p50",
    "swap_hot_us_p99",
    "task_load_ms",
    "mixed_batch_ratio",
    "task_bytes",
    "open_ratio",
    "import_ms",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tasks = {"alpha": {"seed": 1}, "beta": {"seed": 2}}
    return make_deployment(tmp_path_factory.mktemp("bench"), "mistral", tasks)[1]


def test_report(folder, tmp_path):
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(
        main, ["bench", str(folder), "--task", "beta", "--threads", "1", "--json-file", str(path)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    values = {metric["name"]: metric["value"] for metric in report["metrics"]}
    assert list(values) == NAMES
    assert all(value > 0 for name, value in values.items() if name != "task_bytes")
    assert values["task_bytes"] >= 0
    assert values["swap_hot_us_p50"] <= values["swap_hot_us_p99"]
    environment = report["environment"]
    assert (environment["task"], environment["threads"]) == ("beta", 1)
    medians = environment["medians_ms"]
    # The median of the rounds' ratios, which the ratio of the medians is near, and not its inverse or another's.
    near = medians["decode_task_ms"] / medians["decode_base_ms"]
    assert near / 3 < values["decode_ratio"] < near * 3


def test_a_slow_task_shows(folder, monkeypatch):
    """Planted: the task's adaptation sleeps, so every ratio with it must grow."""
    import time

    from adalink.runtime.ort.shared_adapter_graph import OnnxSharedAdapterGraph

    run = OnnxSharedAdapterGraph.run

    def slow(self, inputs_embeds, weights):
        time.sleep(0.01 * len(weights["down"]))
        return run(self, inputs_embeds, weights)

    monkeypatch.setattr(OnnxSharedAdapterGraph, "run", slow)
    monkeypatch.setattr(measure, "_SWITCHES", 20)
    bench = measure.Bench(folder, None, "onnxruntime-cpu", 1)
    try:
        metrics, _ = bench.measure(lambda line: None, quick=True)
    finally:
        bench.close()
    values = {metric["name"]: metric["value"] for metric in metrics}
    assert bench.task == "alpha"
    assert values["prefill_ratio"] > 2
    assert values["decode_ratio"] > 2
    assert values["mixed_batch_ratio"] > 2  # eight tasks' weights instead of one's
    assert values["swap_hot_us_p50"] >= 10_000


def test_encoder_has_no_decode(tmp_path):
    _, folder = make_deployment(tmp_path / "bert", "bert", {"alpha": {"seed": 1}})
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(main, ["bench", str(folder), "--json-file", str(path)])
    assert result.exit_code == 0, result.output
    names = [metric["name"] for metric in json.loads(path.read_text())["metrics"]]
    assert names == [name for name in NAMES if name != "decode_ratio"]


def test_wrong_use(folder, tmp_path):
    _, bare = make_deployment(tmp_path / "bare", "mistral", {})
    for arguments, message in (
        ([bare], "has no task to measure"),
        ([folder, "--task", "gamma"], "deployed are: alpha, beta"),
    ):
        result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
        assert result.exit_code == 2
        assert message in result.stderr


class Machine:
    """A clock, and a deployment that takes time by rule: a task more than the base, later steps more, prompts most."""

    prefill_s, step_s, embed_s, load_s = 8e-3, 2e-3, 5e-6, 3e-3

    def __init__(self, bench, monkeypatch):
        self.now, self.asked, self.loaded, self.bench = 0.0, [], {"alpha"}, bench
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))
        for name in ("run", "generate", "input_embeddings", "load_task", "unload_task"):
            monkeypatch.setattr(bench._deployment, name, getattr(self, name))

    def cost(self, tasks):
        """Of the base model 1; a task takes a quarter more, several of them a half."""
        names = {tasks} if tasks is None or isinstance(tasks, str) else set(tasks)
        return 1.0 if names == {None} else 1.25 if len(names) == 1 else 1.875

    def run(self, *, input_ids, tasks):
        self.asked.append(("run", tasks))
        self.now += self.prefill_s * self.cost(tasks)

    def generate(self, prompts, *, tasks, max_new_tokens, draft_tokens):
        assert draft_tokens == 0
        self.asked.append(("generate", tasks))
        for step in range(max_new_tokens):
            self.bench._starts.append(self.now)
            self.now += (step * self.step_s or 50 * self.prefill_s) * self.cost(tasks)

    def input_embeddings(self, ids, tasks=None):
        self.asked.append(("input_embeddings", tasks))
        swaps = sum(kind == "input_embeddings" for kind, _ in self.asked)
        self.now += self.embed_s * (10 if swaps % 50 == 0 else 1)

    def load_task(self, name):
        assert not gc.isenabled()
        self.now += 0.0 if name in self.loaded else self.load_s
        self.loaded.add(name)

    def unload_task(self, name):
        self.loaded.discard(name)


def test_figures_of_known_times(folder, monkeypatch):
    bench = measure.Bench(folder, None, "onnxruntime-cpu", 1)
    names = bench._deployment.tasks
    try:
        machine = Machine(bench, monkeypatch)
        metrics, medians = bench.measure(lambda line: None, quick=True)
        assert bench._deployment.tasks == names, "copies of a task are taken away"
    finally:
        bench.close()
    assert gc.isenabled()
    values = {metric["name"]: metric["value"] for metric in metrics}
    assert values == pytest.approx({
        "prefill_ratio": 1.25, "decode_ratio": 1.25, "swap_hot_us_p50": 5.0, "swap_hot_us_p99": 50.0,
        "task_load_ms": 3.0, "mixed_batch_ratio": 1.5,
    })  # fmt: skip
    assert medians == pytest.approx({
        "prefill_base_ms": 8.0, "prefill_task_ms": 10.0, "decode_base_ms": 11.0, "decode_task_ms": 13.75,
        "mixed_batch_single_ms": 11.25, "mixed_batch_mixed_ms": 16.875,
    })  # fmt: skip  # the medians of steps 1 to 10, and 1 to 8
    runs = [tasks for kind, tasks in machine.asked if kind == "run"]
    assert runs[:4] == [None, "alpha", "alpha", None], "who goes first changes"
    swapped = [tasks for kind, tasks in machine.asked if kind == "input_embeddings"]
    assert all(one != other for one, other in itertools.pairwise(swapped))


def test_a_drift_of_the_machine_favours_nobody(folder, monkeypatch):
    """It becomes slower at two moments: the ratios of neighbours say what a ratio of medians would not."""
    bench = measure.Bench(folder, None, "onnxruntime-cpu", 1)
    samples = {"base": [[1.0], [2.0], [4.0], [8.0]], "task": [[2.0], [3.0], [8.0], [9.0]]}
    try:
        Machine(bench, monkeypatch)
        monkeypatch.setattr(bench, "_prefill", lambda: samples)
        metrics, medians = bench.measure(lambda line: None, quick=True)
    finally:
        bench.close()
    assert metrics[0] == {"name": "prefill_ratio", "value": 1.75, "unit": "1"}  # of 2, 1.5, 2 and 1.125
    assert (medians["prefill_base_ms"], medians["prefill_task_ms"]) == (3000.0, 5500.0)


def test_memory_of_a_task_is_that_of_one(folder, monkeypatch):
    """What the first tasks allocate for all is not counted."""
    bench = measure.Bench(folder, None, "onnxruntime-cpu", 1)
    try:
        tasks = bench._deployment._tasks
        monkeypatch.setattr(measure, "_resident_bytes", lambda: 10**9 + 700 * len(tasks._loaded.entries))
        assert bench._memory_growth() == 700
        assert tasks.names == ("alpha", "beta")
        monkeypatch.setattr(measure, "_resident_bytes", lambda: None)
        assert bench._memory_growth() is None
    finally:
        bench.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_that_of_the_process():
    before = measure._resident_bytes()
    pages = mmap.mmap(-1, 32 << 20)
    np.frombuffer(pages, np.uint8)[:: mmap.PAGESIZE] = 1
    assert measure._resident_bytes() - before == pytest.approx(32 << 20, rel=0.1)
