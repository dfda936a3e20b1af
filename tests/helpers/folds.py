"""Folds of a task, as this kit and as older kits export them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch
from helpers.loras import ACTIVATIONS
from helpers.runtime import reseal
from safetensors.numpy import save_file

from adalink.export.adapter.export import export_adapter
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.manifest import Fold, Task
from adalink.runtime.storage.manifest_io import read_manifest


def export_folded(source: Path, folder: Path, name: str, fold: str) -> Task:
    """Export an adapter with a fold; ``"rank"``, which only older kits exported, is written beside it."""
    task = export_adapter(source, folder, name=name, fold=fold if fold == "table" else None, replace=True).tasks[name]
    return task if fold == "table" else add_rank_fold(folder, name)


def add_rank_fold(folder: Path, name: str) -> Task:
    """The bottleneck of every token, as deployments of older kits hold it."""
    manifest = read_manifest(folder)
    base, task = manifest.base, manifest.tasks[name]
    adapter = read_adapter((folder / task.config).parent)
    embeds = torch.from_numpy(open_table(folder / base.embeddings, base).block(0, base.vocab_size).astype(np.float64))
    weights = {key: torch.from_numpy(values).double() for key, values in adapter.weights.items()}
    hidden = torch.nn.functional.linear(embeds, weights["text.down.weight"], weights.get("text.down.bias"))
    path = str(Path(task.config).parent / "hidden.safetensors")
    save_file({"hidden": ACTIVATIONS[task.activation](hidden).float().numpy()}, folder / path)
    folded = msgspec.structs.replace(task, fold=Fold(kind="rank", path=path))
    empty = next(iter(manifest.files.values()))
    reseal(folder, tasks={**manifest.tasks, name: folded}, files={**manifest.files, path: empty})
    return folded
