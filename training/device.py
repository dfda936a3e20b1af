"""The device of a training run, and whether it supports the requested precision."""

from __future__ import annotations

import torch

from adalink.runtime.errors import ConfigError


def resolve_device(device: str) -> str:
    """``"cpu"`` or ``"cuda"`` for ``"auto"``, ``"cpu"`` or ``"cuda"``; raises ``ConfigError`` where no GPU is found."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda', but PyTorch finds no CUDA GPU on this machine: take 'cpu'")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def precision_warning(device: str, precision: str) -> str | None:
    """Warning for a precision that the device computes slowly; ``None`` if there is nothing to warn of.

    On a CPU without bfloat16 instructions PyTorch computes such products in plain loops: those of a small decoder took
    40 to 110 times as long as in float32 (AMD EPYC with AVX2, PyTorch 2.13). Without oneDNN, which knows the
    instructions, there is no warning.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"`` or ``"bfloat16"``.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if (device, precision) != ("cpu", "bfloat16") or not has_onednn or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "this CPU has no instructions for bfloat16: a step will take many times as long as in float32, which is the "
        "precision to choose here"
    )
