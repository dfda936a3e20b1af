"""`python -m benchmarks.size` without its peers: scoring, files of llama.cpp's types, one process, resuming, report."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.process import MeasurementError
from benchmarks.size import __main__ as run
from benchmarks.size import gguf_files, seeded_model
from benchmarks.size.accuracy import HostEmbedder, Row, is_right, measure, read_rows
from benchmarks.size.cases import MODELS, quick
from benchmarks.size.engines import common
from benchmarks.size.engines.common import FIELDS, Engine, Settings, measure_engine
from benchmarks.size.plot import draw
from benchmarks.size.report import accuracy_rows, export_rows, figure_rows, ratio_rows, section
from benchmarks.size.watched import watch


def scores(*likeliest: int) -> np.ndarray:
    """Logits whose likeliest token at each place is the one that is said."""
    return np.eye(10, dtype=np.float32)[list(likeliest)]


def test_a_row_is_right_with_its_completion_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"topic": [{"prompt": [4, 5, 6], "target": [7, 2]}] * 4}), encoding="utf-8")
    rows = read_rows(path)
    row = rows["topic"][0]
    assert row.ids == [4, 5, 6, 7]
    assert list(row.positions) == [2, 3]
    replies = iter([scores(7, 2), scores(7, 3), scores(1, 2), scores(7, 2)])
    assert measure(rows, lambda task, row: next(replies)) == {"topic": {"right": 0.5, "rows": 4}}
    assert len(read_rows(path, 2)["topic"]) == 2


@pytest.mark.parametrize(("logits", "fault"), [(scores(7), "1 places, expected 2"), (scores(7, 2) * np.nan, "not num")])
def test_other_logits_are_no_answer(logits: np.ndarray, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        is_right(Row([4], [7, 2]), logits)


def test_the_host_adapts_as_the_kit_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    table, down, up = rng.normal(size=(20, 8)), rng.normal(size=(4, 8)), rng.normal(size=(8, 4))
    weights = {"topic.down": down.astype(np.float32), "topic.up": up.astype(np.float32)}
    np.savez(tmp_path / "a.npz", allow_pickle=False, **weights)
    embed = HostEmbedder.read(table.astype(np.float32), tmp_path / "a.npz")
    exact = table[[3, 17]] + np.einsum("dr,re,te->td", up, down, table[[3, 17]])
    np.testing.assert_allclose(embed("topic", [3, 17]), exact, rtol=1e-5, atol=1e-5)


# Of llama.cpp's own Q4_K_M files: Llama-7B (32 layers of 4096) and SmolLM2-135M (30 layers of 576).
@pytest.mark.parametrize(
    ("name", "columns", "file_type", "layers", "expected"),
    [
        ("token_embd.weight", 4096, "Q4_K_M", 32, "Q6_K"),
        ("blk.0.attn_v.weight", 4096, "Q4_K_M", 32, "Q6_K"),
        ("blk.4.ffn_down.weight", 11008, "Q4_K_M", 32, "Q4_K"),
        ("blk.6.ffn_down.weight", 11008, "Q4_K_M", 32, "Q6_K"),
        ("blk.28.ffn_down.weight", 11008, "Q4_K_M", 32, "Q6_K"),
        ("blk.0.attn_q.weight", 4096, "Q4_K_M", 32, "Q4_K"),
        ("token_embd.weight", 576, "Q4_K_M", 30, "Q8_0"),
        ("blk.0.attn_q.weight", 576, "Q4_K_M", 30, "Q5_0"),
        ("blk.5.ffn_down.weight", 1536, "Q4_K_M", 30, "Q6_K"),
        ("blk.0.attn_v.weight", 4096, "Q4_0", 32, "Q4_0"),
        ("token_embd.weight", 4096, "Q4_0", 32, "Q6_K"),
        ("token_embd.weight", 4096, "Q8_0", 32, "Q8_0"),
    ],
)
def test_types_of_tensors_are_llama_cpps(name: str, columns: int, file_type: str, layers: int, expected: str) -> None:
    assert gguf_files.type_of(name, (32, columns), file_type, layers).name == expected


def test_a_gguf_file_of_a_folder_is_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    tiny = {"hidden": 64, "layers": 2, "inner": 96, "heads": 4, "kv_heads": 2, "vocabulary": 80}
    monkeypatch.setitem(seeded_model.SIZES, "tiny", tiny)
    folder = seeded_model.write_model(tmp_path / "hf", "tiny", "float32")

    def by_gguf(values: np.ndarray, kind: int, row_bytes: int) -> np.ndarray:
        return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType(kind)))

    monkeypatch.setattr(gguf_files, "quantize", by_gguf)
    gguf_files.write_file(folder, tmp_path / "model.gguf", "Q8_0")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert read.state_dict().keys() == expected.keys()
    for name, value in read.state_dict().items():
        # Half a step of the largest block, and its scale in half precision.
        limit = (0.5001 / 127 + 2**-11) * float(expected[name].abs().max())
        assert float((value - expected[name]).abs().max()) <= limit, name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "model.gguf"]


class FakeEngine(Engine):
    """A token each half millisecond, or one too few for a batch."""

    packages = ("numpy",)
    is_short = False

    def __init__(self, settings: Settings) -> None:
        assert settings.context == 3 + 4

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        time.sleep(new_tokens * 5e-4)
        return [[7] * (new_tokens - (self.is_short and len(prompts) > 1)) for _ in prompts]

    def logits(self, task: str, row: Row) -> np.ndarray:
        raise NotImplementedError


def test_an_engine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: dict[str, Any] = {"first": [1, 2, 3], "rows": [[1], [2]]}
    settings = Settings(tmp_path, threads=1, context=7)
    real = common._seconds
    # The clock of the machine is left out: four tokens take longer than one on an idle machine alone.
    monkeypatch.setattr(
        common, "_seconds", lambda engine, prompts, count: 0 * real(engine, prompts, count) + count / 100
    )
    figures = measure_engine(FakeEngine, settings, prompts, new_tokens=4, repeats=2)
    assert figures["tok_s_1"] == pytest.approx(100)
    assert sorted(figures) == sorted(FIELDS)
    assert figures["first_tokens"] == [7] * 8
    slow_first = iter([0.2, 0.1])
    monkeypatch.setattr(common, "_seconds", lambda *_: next(slow_first))
    with pytest.raises(RuntimeError, match=r"4 tokens took 0\.100 s and one took 0\.200 s: stop other"):
        measure_engine(FakeEngine, settings, prompts, new_tokens=4, repeats=1)
    monkeypatch.undo()
    monkeypatch.setattr(FakeEngine, "is_short", True)
    with pytest.raises(RuntimeError, match="asked for 1 tokens, got"):
        measure_engine(FakeEngine, settings, prompts, new_tokens=4, repeats=2)


def test_a_process_is_watched() -> None:
    code = "x = bytearray(64 << 20); import time; time.sleep(0.1)"
    took = watch([sys.executable, "-S", "-c", code])
    assert 64 << 20 < took["peak_bytes"] < 128 << 20
    assert took["seconds"] > 0.1
    with pytest.raises(subprocess.CalledProcessError):
        watch([sys.executable, "-S", "-c", "raise SystemExit(3)"])


def figures(speed: float) -> dict[str, Any]:
    return {"open_s": 2 / speed, "first_token_ms": 1e3 / speed, "tok_s_1": speed, "tok_s_16": 4 * speed,
            "resident_mb": 250.0, "resident_16_mb": 300.0}  # fmt: skip


class FakeFiles:
    """Files that are there, but for one peer's."""

    removed = False

    def __init__(self, work: Path) -> None:
        self._work = work

    def make(self) -> dict[str, str]:
        return {"genai-int4": "could not be made: no builder"}

    def write_inputs(self) -> tuple[Path, Path, Path]:
        return self._work, self._work, self._work

    def made(self, case: Any) -> dict[str, Any]:
        exports = [{"seconds": seconds, "peak_bytes": 2e9} for seconds in (5.0, 60.0, 7.0)]
        return {"shipped_bytes": 160_000_000 if case.engine == "kit" else 80_000_000, "exports": exports}

    def path(self, case: Any) -> Path:
        return self._work

    def digest(self, path: Path) -> str:
        return "0" * 64

    def remove_checkpoint(self) -> None: ...

    def remove(self) -> None:
        self.removed = True


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run of three rounds, the second one slow for all, in which Q8_0 fails; and how to run it again."""
    calls: list[str] = []

    def run_json(command: list[Any], timeout_s: float, log: Path) -> dict[str, Any]:
        words = [str(word) for word in command]
        calls.append(log.stem)
        if "accuracy" in words:
            return {"tasks": {"reuters-r8": {"right": 0.935, "rows": 200}}}
        if "llama-q8_0" in log.name:
            raise MeasurementError("ended with code 1: no memory")
        return figures((1.0 if ".1." in log.name else 10.0) * (3 if "kit" in log.name else 2))

    monkeypatch.setattr(run, "run_json", run_json)
    options = argparse.Namespace(
        peers_python=Path("python"), work=tmp_path, threads=2, keep=False, no_accuracy=False, rows=200, note="Busy.",
        command="python -m benchmarks.size",
    )  # fmt: skip

    def again(known: dict[str, Any]) -> dict[str, Any]:
        bench = run.Bench(quick(MODELS["smollm2"]), options, known)
        object.__setattr__(bench._model, "rounds", 3)
        bench._files = FakeFiles(tmp_path)  # type: ignore[assignment]
        return bench.report()

    return SimpleNamespace(report={"smollm2": again({})}, again=again, calls=calls)


def test_rounds_alternate_and_are_kept(measured: SimpleNamespace) -> None:
    rounds = [call.removeprefix("smollm2.") for call in measured.calls if "accuracy" not in call]
    assert rounds == [
        *("kit-int4.0", "llama-q4_0.0", "llama-q4_k_m.0", "llama-q8_0.0"),
        *("llama-q4_k_m.1", "llama-q4_0.1", "kit-int4.1"),
        *("kit-int4.2", "llama-q4_0.2", "llama-q4_k_m.2"),
    ]
    measured.calls.clear()
    assert measured.again({})["cases"]["kit-int4"] == measured.report["smollm2"]["cases"]["kit-int4"]
    assert measured.calls == ["smollm2.llama-q8_0.0"]  # what failed is tried again, nothing else


def test_accuracy_of_the_report_is_kept_for_the_same_files(measured: SimpleNamespace, tmp_path: Path) -> None:
    known = json.loads(json.dumps(measured.report["smollm2"]["cases"]))
    known["llama-q4_0"]["accuracy"]["files"] = "1" * 16
    shutil.rmtree(tmp_path / "results")
    measured.calls.clear()
    assert measured.again(known)["cases"]["kit-int4"]["accuracy"] == known["kit-int4"]["accuracy"]
    assert [call for call in measured.calls if "accuracy" in call] == ["smollm2.llama-q4_0.accuracy"]


def test_the_report_is_of_medians_and_of_ratios_of_one_round(measured: SimpleNamespace) -> None:
    report = json.loads(json.dumps(measured.report))
    cases = report["smollm2"]["cases"]
    assert figure_rows(cases)[0] == ["AdaLink Kit, int4", "160", "250", "0.07", "33", "30", "120"]
    assert figure_rows(cases)[3][:2] == ["llama.cpp, Q8_0", "ended with code 1: no memory"]
    assert ratio_rows(cases)[0] == ["llama.cpp, Q4_0", "2.00", "1.00", "0.67", "0.67", "1.50", "1.50"]
    assert [row[0] for row in ratio_rows(cases)] == ["llama.cpp, Q4_0", "llama.cpp, Q4_K_M"]
    assert accuracy_rows(cases)[-1] == ["AdaLink Kit, int4", "160", "93.50 %"]
    exports = [["SmolLM2-135M", "AdaLink Kit, int4", "7", "2.0"]]
    exports.append(["SmolLM2-135M", "onnxruntime-genai, int4", "could not be made: no builder", ""])
    assert export_rows(report) == exports
    assert "nan" not in section(report)


def test_the_plot_of_sizes(measured: SimpleNamespace, tmp_path: Path) -> None:
    draw(measured.report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
