"""Models that are large in some way, from seeded checkpoints: memory of an export, and a matrix above 2 GiB."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from benchmarks.size import export_memory, seeded_model

MIB = 1 << 20


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one layer and of twelve, of 15 million parameters each."""
    for name, layers in {"one": 1, "twelve": 12}.items():
        sizes = {"hidden": 1024, "layers": layers, "inner": 4096, "heads": 16, "kv_heads": 4, "vocabulary": 20000}
        monkeypatch.setitem(seeded_model.SIZES, name, sizes)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "quantization"), [("portable", None), ("onnxruntime-cpu", "int4")])
def test_memory_follows_the_largest_matrix(tmp_path: Path, layers: None, target: str, quantization: str | None) -> None:
    """Eleven layers more are 660 MB in float32; memory must grow by little of that."""
    peaks = []
    for size in ("one", "twelve"):
        seeded_model.write_model(tmp_path / size, size)
        measured = export_memory.measure(tmp_path / size, tmp_path / f"{size}-out", "float32", target, quantization)
        peaks.append(measured["peak_bytes"])
    assert peaks[1] - peaks[0] < 100 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "onnxruntime-cpu"])
def test_a_matrix_above_two_gibibytes(tmp_path: Path, target: str) -> None:
    """262,144 x 2,560 in float32, exported, opened and run; the last rows lie behind the limit."""
    from transformers import LlamaForCausalLM

    if shutil.disk_usage(tmp_path).free < 8 << 30:
        pytest.skip("needs 8 GB of disk")
    folder = seeded_model.write_model(tmp_path / "model", "matrix")
    ids = np.array([[262143, 5, 262000, 131072]])
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(input_ids=torch.from_numpy(ids)).logits.numpy()
        del model
    export_base(folder, tmp_path / "out", target=target)
    assert (tmp_path / "out/base" / target / "model.onnx.data").stat().st_size > 2**31
    with Deployment.open(tmp_path / "out", threads=1) as deployment:
        logits = deployment.run(input_ids=ids)["logits"]
    shutil.rmtree(tmp_path / "out")
    assert np.abs(expected[..., -1000:]).max() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-3)
