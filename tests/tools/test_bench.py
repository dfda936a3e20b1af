"""`adalink bench`: the fixed names, sane values, and that what it compares is what it says."""

import json

import pytest
from click.testing import CliRunner
from tiny_deployments import make_deployment

from adalink.tools import measure
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
    result = CliRunner().invoke(main, ["bench", str(folder), "--task", "beta", "--threads", "1", "--json", str(path)])
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
    assert values["decode_ratio"] == pytest.approx(medians["decode_task_ms"] / medians["decode_base_ms"], rel=0.3)


def test_a_slow_task_shows(folder, monkeypatch):
    """Planted: the task's adaptation sleeps, so every ratio with it must grow."""
    import time

    from adalink.runtime.onnxruntime_bank import OnnxBankGraph

    run = OnnxBankGraph.run

    def slow(self, inputs_embeds, weights):
        time.sleep(0.01 * len(weights["down"]))
        return run(self, inputs_embeds, weights)

    monkeypatch.setattr(OnnxBankGraph, "run", slow)
    monkeypatch.setattr(measure, "_SWAPS", 20)
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
    result = CliRunner().invoke(main, ["bench", str(folder), "--json", str(path)])
    assert result.exit_code == 0, result.output
    names = [metric["name"] for metric in json.loads(path.read_text())["metrics"]]
    assert names == [name for name in NAMES if name != "decode_ratio"]


def test_wrong_use(folder, tmp_path):
    _, bare = make_deployment(tmp_path / "bare", "mistral", {})
    for arguments, message in (([bare], "has no task to measure"), ([folder, "--task", "gamma"], "it has alpha, beta")):
        result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
        assert result.exit_code == 2
        assert message in result.stderr
