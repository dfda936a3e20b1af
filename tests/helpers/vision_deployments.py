"""A small deployment that takes images, and the same answers from PyTorch with the adapters attached there."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, TILE_TOKENS, llava, paligemma
from helpers.tiny_tokenizer import make_prefix_tokenizer, make_tile_tokenizer, make_tokenizer
from helpers.vision import clip_processor, idefics3_processor, patch_processor, siglip_processor, tile_processor
from onnx import numpy_helper
from PIL import Image
from transformers import Idefics3Processor, PaliGemmaProcessor

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage.adapter import Adapter
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
    """Write ``rows.jsonl`` and pictures ``0.png``, ``1.png``, ... of these heights and widths."""
    rng = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / f"{index}.png")
    lines = [{"prompt": row.prompt, "completion": row.completion, "images": row.images} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))


@dataclass
class Seeing:
    """A deployment on disk, the PyTorch model it came from, and its adapters."""

    folder: Path
    model: Any
    adapters: dict[str, Adapter]
    sources: Path

    @contextmanager
    def adapted(self, model: Any, task: str | None) -> Iterator[Any]:
        if task is None:
            yield model
            return
        with load_adapter(self.sources / task, model):
            yield model

    def inputs(self, tokens: Sequence[int], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """One row as the model takes it: placeholders repeated, pixels from its own processor."""
        ids = [t for token in tokens for t in [token] * (IMAGE_TOKENS if token == IMAGE_TOKEN else 1)]
        own = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        if images:
            own["pixel_values"] = clip_processor()(images=list(images), return_tensors="pt")["pixel_values"]
        return own

    def greedy(self, tokens: Sequence[int], images: Sequence[Image.Image], task: str | None, steps: int) -> list[int]:
        """What ``model.generate`` gives for one row alone, without the token that ends it."""
        inputs = self.inputs(tokens, images)
        with self.adapted(self.model, task) as model, torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return [token for token in made.tolist() if token != 2]

    def logits(
        self, tokens: Sequence[int], images: Sequence[Image.Image], task: str | None
    ) -> tuple[np.ndarray, float]:
        """PyTorch's logits of one row, and a limit for another float32 evaluation (as ``helpers.export.yardstick``)."""
        inputs, found = self.inputs(tokens, images), []
        for model in (self.model, copy.deepcopy(self.model).double()):
            with self.adapted(model, task), torch.no_grad():
                found.append(model(**inputs).logits[0])
        return found[0].numpy(), 8 * float((found[0] - found[1]).abs().max())


@dataclass
class SeeingTiles(Seeing):
    """Likewise of a model that takes tiles; a row is its text, which transformers' own processor makes tokens of."""

    def inputs(self, tokens: Any, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        processor = Idefics3Processor(idefics3_processor(), make_tile_tokenizer(), image_seq_len=TILE_TOKENS)
        return dict(processor(text=[tokens], images=[list(images)] if images else None, return_tensors="pt"))


@dataclass
class SeeingPrefix(Seeing):
    """Likewise of PaliGemma; a row is what people write, which transformers' own processor makes a prompt of."""

    def inputs(self, tokens: Any, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        if images:
            own = siglip_processor()
            own.image_seq_length = IMAGE_TOKENS
            processor = PaliGemmaProcessor(own, make_prefix_tokenizer())
            found = dict(processor(text=[tokens], images=[list(images)], return_tensors="pt"))
            del found["labels"]
            return found
        # The processor takes no text alone; the model does, as any prompt.
        ids = make_prefix_tokenizer()(f"<bos>{tokens}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@dataclass
class SeeingPatches(Seeing):
    """Likewise of a model whose pictures keep their shape."""

    def inputs(self, tokens: Sequence[int], images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        own = dict(patch_processor()(images=list(images), return_tensors="pt")) if images else {}
        left = iter([int(grid.prod()) // 4 for grid in own.get("image_grid_thw", ())])
        ids = [t for token in tokens for t in [token] * (next(left, 1) if token == IMAGE_TOKEN else 1)]
        row = torch.tensor([ids])
        types = {"mm_token_type_ids": (row == IMAGE_TOKEN).int()} if images else {}
        return {"input_ids": row, "attention_mask": torch.ones_like(row), **own, **types}


def build_seeing(root: Path, **settings: Any) -> Seeing:
    model, folder = llava(), root / "deployment"
    export_base(model, folder, tokenizer=make_tokenizer(), image_processor=clip_processor(), **settings)
    return Seeing(folder, model, _adapters(root, folder), root / "adapters")


def build_seeing_tiles(root: Path, model: Any, **settings: Any) -> SeeingTiles:
    folder = root / "deployment"
    export_base(model, folder, tokenizer=make_tile_tokenizer(), image_processor=tile_processor(), **settings)
    return SeeingTiles(folder, model, _adapters(root, folder), root / "adapters")


def build_seeing_prefix(root: Path, model: Any = None, **settings: Any) -> SeeingPrefix:
    model, folder = model or paligemma(), root / "deployment"
    export_base(model, folder, tokenizer=make_prefix_tokenizer(), image_processor=siglip_processor(), **settings)
    return SeeingPrefix(folder, model, _adapters(root, folder), root / "adapters")


def build_seeing_patches(root: Path, model: Any, **settings: Any) -> SeeingPatches:
    folder = root / "deployment"
    export_base(model, folder, tokenizer=make_tokenizer(), image_processor=patch_processor(), **settings)
    return SeeingPatches(folder, model, _adapters(root, folder), root / "adapters")


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
