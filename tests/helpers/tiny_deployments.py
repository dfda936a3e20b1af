"""Small deployments of real classes: a tiny model saved to disk, exported, with seeded adapters as its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage.adapter import Adapter, AdapterConfig, encode_adapter, make_adapter
from adalink.training.models.loading import base_fingerprint, load_base


def make_model_folder(folder: Path, family: str) -> Path:
    """Save the tiny model of a family, with a tokenizer, as a Hugging Face folder."""
    FAMILIES[family]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def seeded_adapter(model_folder: Path, seed: int, up_scale: float = 1.0, **changes: object) -> Adapter:
    """An adapter that visibly changes the model's output, unless ``up_scale`` is 0."""
    model = load_base(model_folder)
    settings: dict[str, object] = {"rank": 4, "activation": "gelu", "bias": True, "scope": "all", **changes}
    width = model.get_input_embeddings().weight.shape[1]
    config = AdapterConfig(
        base_model_name_or_path=model_folder.name,
        base_fingerprint=base_fingerprint(model),
        hidden_size=width,
        modalities=("text",),
        **settings,
    )
    rng = np.random.default_rng(seed)
    shapes = {"down.weight": (config.rank, width), "up.weight": (width, config.rank)}
    if config.bias:
        shapes |= {"down.bias": (config.rank,), "up.bias": (width,)}
    weights = {f"text.{name}": rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights["text.up.weight"] *= np.float32(up_scale)
    return make_adapter(config, weights)


def write_adapter(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir(parents=True)
    for name, data in zip(("adapter_config.json", "adapter_model.safetensors"), encode_adapter(adapter), strict=True):
        (folder / name).write_bytes(data)
    return folder


def make_deployment(root: Path, family: str, tasks: Mapping[str, Mapping[str, object]]) -> tuple[Path, Path]:
    """Export a tiny model and its tasks.

    Args:
        root: an empty folder.
        family: a key of ``helpers.tiny_models.FAMILIES``.
        tasks: settings of each task's adapter, ``seed`` among them.

    Returns:
        The model's folder and the deployment's.
    """
    model = make_model_folder(root / "tiny", family)
    deployment = root / "deployment"
    export_base(model, deployment)
    for name, settings in tasks.items():
        adapter = seeded_adapter(model, **settings)
        export_adapter(write_adapter(root / "adapters" / name, adapter), deployment)
    return model, deployment
