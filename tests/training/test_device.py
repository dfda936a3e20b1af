"""Where training runs, and the word of warning where a precision is only emulated."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from adalink.runtime.errors import ConfigError
from adalink.training.device import precision_warning, resolve_device


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="finds no CUDA GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (resolve_device("auto"), resolve_device("cuda"), resolve_device("cpu")) == ("cuda", "cuda", "cpu")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="no flags of an x86-64 CPU to read"
)
def test_the_warning_is_for_cpus_without_the_instructions() -> None:
    """oneDNN takes AVX-512 with BW, VL and DQ, or what goes beyond them."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    has_instructions = {"avx512bw", "avx512vl", "avx512dq"} <= flags
    assert (precision_warning("cpu", "bfloat16") is None) == has_instructions


def test_nothing_is_said_of_what_is_fast_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "no instructions for bfloat16" in str(precision_warning("cpu", "bfloat16"))
    assert precision_warning("cpu", "float32") is None
    assert precision_warning("cuda", "bfloat16") is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert precision_warning("cpu", "bfloat16") is None
