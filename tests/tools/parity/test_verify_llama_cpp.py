"""A GGUF file in llama.cpp, verified against PyTorch with its dequantised weights; planted faults are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from helpers.llama_cpp import BACKEND, build_gguf
from helpers.runtime import Tiny
from helpers.tiny_ggufs import wide, write_gguf

from adalink.runtime.errors import ContractError
from adalink.runtime.llama_cpp.context import LlamaContext
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.engines.float32_gguf import write_float32
from adalink.tools.parity.reference.gguf_file import file_layers
from adalink.tools.parity.suite import VerifyOptions, verify
from adalink.training.models.gguf.header import read_header
from adalink.training.models.loading import load_base

OPTIONS = VerifyOptions(backend=BACKEND, threads=1, quick=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_gguf(tmp_path_factory.mktemp("q4_0"), "llama", "Q4_0")


def file_of(tiny: Tiny) -> Path:
    return tiny.sources.parent / "tiny.gguf"


def test_a_quantised_file_passes(quantized: Tiny) -> None:
    report = verify(quantized.folder, str(file_of(quantized)), {}, OPTIONS)
    names = {check.name for check in report.checks}
    assert {"quantization/gguf", "activations/base/logits", "scheduler/decode-logits", "mixed/logits"} <= names
    assert [check.name for check in report.checks if not check.passed] == []
    assert report.receipt["base_unchanged"]


@pytest.mark.slow
def test_a_fault_of_the_engine_is_found(quantized: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth more at one position: less than rounded activations change, so the float32 copy has to show it."""
    decode = LlamaContext.decode

    def faulty(self: LlamaContext, embeds: Any, numbers: Any, positions: Any, wanted: Any) -> Any:
        if embeds.ndim == 2:
            embeds = embeds * np.where(np.array(positions) == 3, np.float32(1.01), np.float32(1))[:, None]
        return decode(self, embeds, numbers, positions, wanted)

    monkeypatch.setattr(LlamaContext, "decode", faulty)
    report = verify(quantized.folder, str(file_of(quantized)), {}, OPTIONS)
    assert {"base/logits"} <= {check.name for check in report.checks if not check.passed}


def test_weights_of_another_file_are_found(quantized: Tiny, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", wide("llama"), "llama", kind=lambda name: "Q8_0")
    with pytest.raises(ContractError, match="has fingerprint"):
        verify(quantized.folder, str(other), {}, OPTIONS)
    variant = read_manifest(quantized.folder).variants[BACKEND]
    assert variant.quantization is not None
    layers, checks = file_layers(load_base(other), quantized.folder / variant.graph, variant.quantization)
    assert {layer.type for layer in layers} == {"Q4_0"}
    assert [check.passed for check in checks] == [False, True]
    _, checks = file_layers(quantized.model, other, variant.quantization)
    assert [check.passed for check in checks] == [False, False]


def test_the_float32_copy_has_the_files_numbers(quantized: Tiny, tmp_path: Path) -> None:
    source, out = file_of(quantized), tmp_path / "float32.gguf"
    write_float32(source, out)
    before, after = read_header(source), read_header(out)
    assert after.metadata == before.metadata
    data, copy = np.fromfile(source, np.uint8), np.fromfile(out, np.uint8)
    for name, place in before.tensors.items():
        kind, count = GGMLQuantizationType(place.kind), int(np.prod(place.shape))
        size = count * 4 if kind.name == "F32" else count // 32 * 18
        numbers = dequantize(data[place.start : place.start + size], kind)
        start = after.tensors[name].start
        assert after.tensors[name].type == "F32"
        assert copy[start : start + 4 * count].tobytes() == np.ascontiguousarray(numbers).tobytes()
