"""A small deployment that takes images, and the same answers from PyTorch with the adapters attached there."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.vision_families import FAMILIES, TILES, VisionFamily
from onnx import numpy_helper
from PIL import Image

from adalink.export.adapter.export import export_adapter
from adalink.runtime import Deployment
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.adapter_io import load_adapter
from adalink.training.data.rows import TrainingRow

TASKS: dict[str, dict[str, Any]] = {
    "words": {"rank": 4, "activation": "gelu", "bias": True, "scope": "all", "modalities": ("text",)},
    "looks": {"rank": 3, "activation": "silu", "bias": True, "scope": "all", "modalities": ("image",)},
    "both": {
        "rank": {"text": 5, "image": 9},
        "activation": "tanh",
        "bias": False,
        "scope": "all",
        "modalities": ("image", "text"),
    },
    "asked": {"rank": 4, "activation": "identity", "bias": True, "scope": "prompt", "modalities": ("text", "image")},
}


def picture(seed: int, height: int = 30, width: int = 41) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def write_rows(folder: Path, rows: Sequence[TrainingRow], sizes: Sequence[tuple[int, int]]) -> None:
    """Write ``rows.jsonl`` and images ``0.png``, ``1.png``, ... of these heights and widths."""
    rng = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / f"{index}.png")
    lines = [{"prompt": row.prompt, "completion": row.completion, "images": row.images} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))


@dataclass
class VisionDeployment:
    """A deployment on disk, the PyTorch model it came from, and its adapters."""

    folder: Path
    model: Any
    adapters: dict[str, Adapter]
    sources: Path
    family: VisionFamily

    @contextmanager
    def adapted(self, model: Any, task: str | None) -> Iterator[Any]:
        if task is None:
            yield model
            return
        with load_adapter(self.sources / task, model):
            yield model

    def inputs(self, prompt: Any, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """One row as the model takes it, from its own processor; ``prompt`` as ``VisionFamily.inputs``."""
        return self.family.inputs(prompt, images)

    def greedy(self, prompt: Any, images: Sequence[Image.Image], task: str | None, steps: int) -> list[int]:
        """What ``model.generate`` gives for one row alone, without the token that ends it."""
        inputs = self.inputs(prompt, images)
        with self.adapted(self.model, task) as model, torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return [token for token in made.tolist() if token != 2]

    def logits(self, prompt: Any, images: Sequence[Image.Image], task: str | None) -> tuple[np.ndarray, float]:
        """PyTorch's logits of one row, and a limit for another float32 evaluation (as ``helpers.export.yardstick``)."""
        inputs, found = self.inputs(prompt, images), []
        for model in (self.model, copy.deepcopy(self.model).double()):
            with self.adapted(model, task), torch.no_grad():
                found.append(model(**inputs).logits[0])
        return found[0].numpy(), 8 * float((found[0] - found[1]).abs().max())


def build_vision_deployment(root: Path, name: str = "llava", model: Any = None, **settings: Any) -> VisionDeployment:
    """Export a tiny model, and an adapter of each of ``TASKS``, below ``root``.

    Args:
        root: an empty folder.
        name: a key of ``helpers.vision_families.FAMILIES``.
        model: another model than the one of the family.
        settings: of ``export_base``.
    """
    family, folder = FAMILIES[name], root / "deployment"
    model = model or family.make_model()
    family.export(folder, model, **settings)
    return VisionDeployment(folder, model, _adapters(root, folder), root / "adapters", family)


class VisionDeployments:
    """Deployments by the name of their family, each exported when it is first asked for.

    "NAME portable" is one of the target that runs everywhere.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, VisionDeployment] = {}

    def __getitem__(self, name: str) -> VisionDeployment:
        if name not in self._made:
            family, *target = name.split()
            settings = {"target": target[0]} if target else {}
            self._made[name] = build_vision_deployment(self._root / name, family, **settings)
        return self._made[name]


class VisionExport(NamedTuple):
    """A tiny model and its export."""

    model: Any
    folder: Path
    manifest: Manifest


class VisionExports(dict[str, VisionExport]):
    """Exports without adapters by the name of their family, for both CPU targets, each made when first asked for."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> VisionExport:
        family, folder = FAMILIES[name], self._root / name
        model = family.make_model()
        for target in ("onnxruntime-cpu", "portable"):
            manifest = family.export(folder, model, target=target)
        self[name] = VisionExport(model, folder, manifest)
        return self[name]


def _adapters(root: Path, folder: Path) -> dict[str, Adapter]:
    base = read_manifest(folder).base
    adapters = {}
    for seed, (task, own) in enumerate(TASKS.items()):
        adapters[task] = random_adapter(base.fingerprint, base.hidden_size, 40 + seed, **own)
        export_adapter(write_adapter(root / "adapters" / task, adapters[task]), folder)
    return adapters


def spoil_tower(folder: Path) -> None:
    """Make the largest number of the vision graph's largest tensor a hundredth larger, with digests that fit."""
    path = folder / "base" / "vision" / "model.onnx"
    graph = onnx.load(path)
    tensor = max(graph.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[np.abs(values).argmax()] *= np.float32(1.01)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path.write_bytes(graph.SerializeToString())
    reseal(folder)


NEW_TOKENS = 8
EACH_TASK = (None, "words", "looks", "both", "asked")
PATCH_DEPLOYMENTS = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_vl portable")
VISION_DEPLOYMENTS = ("llava", *TILES, "paligemma", *PATCH_DEPLOYMENTS)

A, B, C = (picture(seed, height, width) for seed, height, width in ((1, 30, 41), (2, 50, 24), (3, 24, 24)))
# Of three and of four tiles; the others of nine and one more, and of six.
LINE, UPRIGHT = picture(3, 7, 100), picture(4, 48, 30)
# Of pieces in three rows and five columns, in eight and two, in one and nine, and of two by two.
GRIDS = [picture(seed, *size) for seed, size in enumerate(((25, 41), (60, 17), (3, 60), (9, 9)), start=1)]
# Prompts and their images: on one, on two and on none.
Prompts = list[tuple[str, list[Any]]]
TILE_PROMPTS: Prompts = [
    ("<image>what?", [A]),
    ("a <image> b\n\n<image>", [B, LINE]),
    ("no picture", []),
    ("<image>", [UPRIGHT]),
]
PATCH_PROMPTS: Prompts = [
    ("@what?", GRIDS[:1]),
    ("a @ b @c", GRIDS[1:3]),
    ("no picture", []),
    ("@.", GRIDS[3:]),
]
PROMPTS: dict[str, Prompts] = {
    "llava": [("@what?", [A]), ("a @b@ c", [B, A]), ("no picture", []), ("@", [C])],
    # What people write: images go in front, or where placeholders stand; one is no text.
    "paligemma": [
        ("caption en", [A]),
        ("which?", [B, A]),
        ("a<image>b <image>c", [A, C]),
        ("no picture", []),
        ("", [C]),
    ],
    **dict.fromkeys(TILES, TILE_PROMPTS),
    **dict.fromkeys(PATCH_DEPLOYMENTS, PATCH_PROMPTS),
}


class VisionCase:
    """An open deployment, prompts under every kind of task, and what PyTorch generates for them."""

    def __init__(self, name: str, made: VisionDeployment) -> None:
        self.prompts, self.made = PROMPTS[name], made
        self.rows = [(prompt, images, task) for prompt, images in self.prompts for task in EACH_TASK]
        self.opened = Deployment.open(made.folder)

    @cached_property
    def expected(self) -> list[list[int]]:
        return [self.made.greedy(prompt, images, task, NEW_TOKENS) for prompt, images, task in self.rows]

    def ids(self, prompt: Any, images: Any) -> Any:
        """Token ids of a row, every placeholder written out."""
        return self.made.inputs(prompt, images)["input_ids"].numpy()


class VisionCases(dict[str, VisionCase]):
    """By the name of their deployment, each made when it is first asked for."""

    def __init__(self, deployments: VisionDeployments) -> None:
        super().__init__()
        self._deployments = deployments

    def __missing__(self, name: str) -> VisionCase:
        self[name] = VisionCase(name, self._deployments[name])
        return self[name]
