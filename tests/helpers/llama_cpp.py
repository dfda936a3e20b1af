"""Deployments of tiny GGUF files for llama.cpp, with their tasks, and the same arithmetic in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.runtime import TASKS, Tiny, random_adapter, write_adapter
from helpers.tiny_ggufs import wide, write_gguf

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.models.loading import load_base

BACKEND = "llama.cpp"


def all_of(kind: str) -> Callable[[str], str]:
    """One type for every matrix, but for tables of positions."""
    return lambda name: "F32" if "position" in name else kind


def build_gguf(root: Path, family: str, kind: str = "F32") -> Tiny:
    """A deployment of a tiny GGUF file for llama.cpp, and the model that transformers loads from it."""
    path = write_gguf(root / "tiny.gguf", wide(family), family, kind=all_of(kind))
    folder = root / "deployment"
    export_base(path, folder, target=BACKEND)
    base = read_manifest(folder).base
    adapters = {}
    for seed, (task, settings) in enumerate(TASKS.items()):
        if "modalities" not in settings:
            adapters[task] = random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
            write_adapter(root / "adapters" / task, adapters[task])
    export_adapters({task: root / "adapters" / task for task in adapters}, folder)
    return Tiny(folder, load_base(path).eval(), adapters, root / "adapters")
