"""Where training runs, and whether what runs there can do the precision that was asked for."""

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
    """What to say before training where it would take far longer than the precision promises.

    On a CPU without instructions for bfloat16 PyTorch computes such products in plain loops: those of a small decoder
    took 40 to 110 times as long as in float32 (AMD EPYC with AVX2, PyTorch 2.13). Where PyTorch has no oneDNN, which
    knows of the instructions, nothing is said.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"`` or ``"bfloat16"``.
    """
    is_known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if (device, precision) != ("cpu", "bfloat16") or not is_known or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "this CPU has no instructions for bfloat16: a step will take many times as long as in float32, which is the "
        "precision to choose here"
    )
