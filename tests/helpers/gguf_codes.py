"""Deployments that keep the codes of tiny GGUF files, and what ``verify`` says of their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.tiny_ggufs import wide, write_gguf

from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.reference.gguf_weights import check_layers
from adalink.tools.parity.reference.quantized_weights import find_layers, read_matrices
from adalink.training.models.loading import load_base


def kind_of(name: str) -> str:
    """A file of several types: the head, the values and what leaves a feed-forward block are not in 4 bits."""
    if "rel_b" in name or "position" in name:
        return "F32"
    if name.startswith(("token_embd", "output")):
        return "Q8_0"
    if "attn_v" in name:
        return "Q5_0"
    return "Q6_K" if "blk.0.ffn_down" in name else "Q4_0"


def export_codes(folder: Path, architecture: str, kind: Callable[[str], str] = kind_of) -> tuple[Path, Path]:
    """A file and its deployment."""
    path = write_gguf(folder / "tiny.gguf", wide(architecture), architecture, kind=kind)
    export_base(path, folder / "deployment", quantization="gguf")
    return path, folder / "deployment"


def graphs_of(folder: Path) -> list[Path]:
    """The graphs with the codes."""
    variant = read_manifest(folder).variants["gguf"]
    return [folder / name for name in (variant.graph, variant.decoder_graph) if name]


def measured(path: Path, folder: Path) -> dict[str, tuple[float, bool]]:
    """What each check of the matrices measures, and whether it passes."""
    quantization = read_manifest(folder).variants["gguf"].quantization
    assert quantization is not None
    matrices = [matrix for graph in graphs_of(folder) for matrix in read_matrices(graph)]
    checks = check_layers(find_layers(load_base(path), matrices), matrices, quantization, path)
    return {check.name.removeprefix("quantization/"): (check.measured, check.passed) for check in checks}
