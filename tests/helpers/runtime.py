"""Small real deployments, exported once a session, and the same arithmetic in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.tiny_models import FAMILIES, VOCAB_SIZE
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage import stamp
from adalink.runtime.storage.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    encode_adapter,
    make_adapter,
    weight_shapes,
)
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.manifest import FileRecord
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest

# Task -> settings of its adapter: every scope, biases, several activations, and one adapter of two modalities.
TASKS: dict[str, dict[str, Any]] = {
    "alpha": {"rank": 5, "activation": "gelu", "bias": False, "scope": "all"},
    "beta": {"rank": 2, "activation": "silu", "bias": True, "scope": "all"},
    "prompted": {"rank": 3, "activation": "identity", "bias": True, "scope": "prompt"},
    "double": {"rank": 4, "activation": "tanh", "bias": True, "scope": "all", "modalities": ("image", "text")},
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
}


@dataclass
class Tiny:
    """A deployment on disk, the PyTorch model it came from, and its adapters."""

    folder: Path
    model: Any
    adapters: dict[str, Adapter]
    sources: Path

    def adapted(self, embeds: torch.Tensor, task: str | None, modality: str = "text") -> torch.Tensor:
        """The method's formula in float64, written out here: the reference of these tests."""
        if task is None:
            return embeds
        adapter = self.adapters[task]
        weights = {k: torch.tensor(v, dtype=torch.float64) for k, v in adapter.weights.items()}
        zero = torch.zeros((), dtype=torch.float64)
        x = embeds.double()
        inner = x @ weights[f"{modality}.down.weight"].T + weights.get(f"{modality}.down.bias", zero)
        outer = ACTIVATIONS[adapter.config.activation](inner) @ weights[f"{modality}.up.weight"].T
        return (x + outer + weights.get(f"{modality}.up.bias", zero)).float()

    def embeds(self, ids: list[int], task: str | None) -> torch.Tensor:
        """Adapted embeddings of one row, shape ``(1, seq, d)``."""
        with torch.no_grad():
            return self.adapted(self.model.get_input_embeddings()(torch.tensor([ids])), task)

    def logits(self, ids: list[int], task: str | None) -> np.ndarray:
        """PyTorch's logits of one unpadded row, shape ``(seq, vocab)``."""
        with torch.no_grad():
            logits: np.ndarray = self.model(inputs_embeds=self.embeds(ids, task)).logits[0].numpy()
        return logits

    def greedy(self, prompt: list[int], task: str | None, steps: int) -> list[int]:
        """Greedy tokens by running the whole sequence anew at each step: no cache, no padding."""
        scope = self.adapters[task].config.scope if task else "all"
        made: list[int] = []
        for _ in range(steps):
            parts = [self.embeds(prompt, task)]
            if made:
                parts.append(self.embeds(made, task if scope == "all" else None))
            with torch.no_grad():
                token = int(self.model(inputs_embeds=torch.cat(parts, 1)).logits[0, -1].argmax())
            if token == 2:
                break
            made.append(token)
        return made


def write_adapter(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = encode_adapter(adapter)
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    return folder


def random_adapter(fingerprint: str, hidden_size: int, seed: int, **settings: Any) -> Adapter:
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        base_fingerprint=fingerprint,
        hidden_size=hidden_size,
        **({"modalities": ("text",)} | settings),
    )
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.normal(size=shape) * (0.8 / np.sqrt(shape[-1]))).astype(np.float32)
        for name, shape in weight_shapes(config, VOCAB_SIZE).items()
    }
    return make_adapter(config, weights)


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest anew with the digests of the files as they are now: integrity has nothing to say."""
    manifest = msgspec.structs.replace(read_manifest(folder), **changes)
    files = {
        path: FileRecord(sha256=digest_file(folder / path), size_bytes=(folder / path).stat().st_size)
        for path in manifest.files
    }
    (folder / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))


def build(family: str, root: Path, modalities: tuple[str, ...] = ("text",)) -> Tiny:
    model = FAMILIES[family]()
    folder = root / "deployment"
    export_base(model, folder, tokenizer=make_tokenizer(), modalities=modalities)
    base = read_manifest(folder).base
    adapters = {}
    for seed, (task, settings) in enumerate(TASKS.items()):
        if set(settings.get("modalities", ())) <= set(modalities):
            adapters[task] = random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
            export_adapter(write_adapter(root / "adapters" / task, adapters[task]), folder)
    return Tiny(folder, model, adapters, root / "adapters")


def let_files_settle(patch: pytest.MonkeyPatch) -> None:
    """Wait until files count as left alone, with a margin of 50 ms for 2 s.

    No one can set the change time of a file back; disks of today tell changes apart that are 10 ms from each other.
    """
    patch.setattr(stamp, "_SETTLED_NS", 50_000_000)
    time.sleep(0.1)
