"""A registry of tiny models that take images: one entry a class, with its inputs and its forward pass written out.

Tests parametrise over ``FAMILIES``. It holds four kinds of models: images of one size (LLaVA, FastVLM), images cut into
tiles (Idefics3, SmolVLM), a prompt that attends in both directions (PaliGemma), and patches of images that keep their
shape (Qwen-VL).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_models import (
    HIDDEN_SIZE,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    PATCH_EDGE,
    PREFIX_IMAGE_TOKEN,
    TILE_EDGE,
    TILE_IMAGE_TOKEN,
    TILE_TOKENS,
    VOCAB_SIZE,
    fast_vlm,
    idefics3,
    llava,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
from helpers.tiny_tokenizer import make_prefix_tokenizer, make_tile_tokenizer, make_tokenizer
from helpers.vision import clip_processor, idefics3_processor, patch_processor, siglip_processor, tile_processor
from PIL import Image
from transformers import Idefics3Processor, PaliGemmaProcessor

from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest import Manifest
from adalink.training.method.config import AdaLinkConfig

Inputs = dict[str, torch.Tensor]
MASKED = -1e30
# What generated positions are, by the name of an input: real, not of the prompt, not of an image.
_GENERATED = {"attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 0}


def config(modalities: Sequence[str], **settings: Any) -> AdaLinkConfig:
    """Of the adapters that ``residual`` writes out."""
    return AdaLinkConfig(**{"rank": 4, "activation": "gelu", "bias": True, "modalities": modalities} | settings)


def disturb(attached: Any, seed: int = 5) -> None:
    """Make adapters that are fresh, which change nothing, ones that change everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def residual(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    inner = x @ adapter.down.weight.T + adapter.down.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return gelu @ adapter.up.weight.T + adapter.up.bias


def pad_left(rows: Sequence[torch.Tensor]) -> Inputs:
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def extend(inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> Inputs:
    """Inputs of a prompt and the tokens generated behind it, with shape ``(batch, steps)``."""
    result = dict(inputs) | {"input_ids": torch.cat([inputs["input_ids"], tokens], dim=1)}
    for name, value in _GENERATED.items():
        if name in inputs:
            result[name] = torch.nn.functional.pad(inputs[name], (0, tokens.shape[1]), value=value)
    return result


@dataclass(frozen=True)
class VisionFamily:
    """A class whose images all have one size; the other kinds override what differs.

    ``rounding`` is how far float32 may be from the forward pass written out.
    """

    make_model: Callable[..., Any]
    make_processor: Callable[..., Any] = clip_processor
    make_tokenizer: Callable[[], Any] = make_tokenizer
    image_token: int = IMAGE_TOKEN
    placeholder: str = "@"
    language_model: str = "language_model"
    rounding: float = 1e-5

    def save(self, folder: Path, model: Any = None) -> Path:
        """Write a Hugging Face folder: model, tokenizer and image processor."""
        for part in (model or self.make_model(), self.make_tokenizer(), self.make_processor()):
            part.save_pretrained(folder)
        return folder

    def export(self, folder: Path, model: Any = None, **settings: Any) -> Manifest:
        """Export a model with the family's tokenizer and image processor, where ``settings`` have no others."""
        parts = {"tokenizer": self.make_tokenizer(), "image_processor": self.make_processor()}
        return export_base(model or self.make_model(), folder, **parts | settings)

    def inputs(self, prompt: Any, images: Sequence[Image.Image]) -> Inputs:
        """One row as the model takes it: placeholders repeated, pixels from its own processor.

        Args:
            prompt: text, or token ids with one placeholder for each image.
            images: images in the order of the placeholders.
        """
        tokens = self.make_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        ids = [t for token in tokens for t in [token] * (IMAGE_TOKENS if token == IMAGE_TOKEN else 1)]
        row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        if images:
            row["pixel_values"] = self.make_processor()(images=list(images), return_tensors="pt")["pixel_values"]
        return row

    def random_inputs(self, images_a_row: Sequence[int] = (1, 2, 0), seed: int = 3) -> Inputs:
        """Rows of seeded words and images, padded on the left to one length; images in the order of the rows."""
        generator, rows = torch.Generator().manual_seed(seed), []
        lengths = iter(self._random_lengths(sum(images_a_row)))
        for count in images_a_row:
            words = torch.randint(3, VOCAB_SIZE - 1, (7,), generator=generator)
            words[words == self.image_token] = 4
            pieces = [words[:2]]
            for number in range(count):
                pieces += [torch.full((next(lengths),), self.image_token), words[2 + number : 3 + number]]
            rows.append(torch.cat([*pieces, words[4:]]))
        inputs = pad_left(rows)
        return (
            inputs | self._random_pixels(images_a_row, generator, inputs["input_ids"]) if any(images_a_row) else inputs
        )

    def _random_lengths(self, images: int) -> list[int]:
        """Positions of each image."""
        return [IMAGE_TOKENS] * images

    def _random_pixels(self, images_a_row: Sequence[int], generator: torch.Generator, ids: torch.Tensor) -> Inputs:
        return {"pixel_values": torch.randn(sum(images_a_row), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}

    def language(self, model: Any) -> Any:
        return getattr(model.model, self.language_model)

    def logits_by_hand(self, model: Any, adapters: Mapping[str, Any], inputs: Inputs, **changes: Any) -> torch.Tensor:
        """The whole method written out: look up, encode, adapt each on its own, merge, run the language model.

        Args:
            model: a base model, nothing attached.
            adapters: modality to adapter, of GELU with biases.
            inputs: what the model takes.
            changes: what the language model is told instead of the right masks and positions.
        """
        ids = inputs["input_ids"]
        with torch.no_grad():
            merged = self._adapt(adapters, "text", self._look_up(model, ids)).clone()
            more: dict[str, Any] = {}
            if "pixel_values" in inputs:
                images, more = self._encode(model, inputs)
                merged[ids == self.image_token] = self._adapt(adapters, "image", images).reshape(-1, HIDDEN_SIZE)
            more |= self._places(inputs) | changes
            return model.lm_head(self.language(model)(inputs_embeds=merged, **more).last_hidden_state)

    @staticmethod
    def _adapt(adapters: Mapping[str, Any], modality: str, values: torch.Tensor) -> torch.Tensor:
        return values + residual(adapters[modality], values) if modality in adapters else values

    def _look_up(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.get_input_embeddings()(ids)

    def _encode(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        """Embeddings of images, and what else of them the language model takes."""
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        if model.config.model_type == "fast_vlm":
            features = tower.last_hidden_state.flatten(2).mT
        else:
            features = tower.hidden_states[-2][:, 1:]
        return model.model.multi_modal_projector(features), {}

    def _places(self, inputs: Inputs) -> dict[str, Any]:
        """Masks and positions for the language model."""
        return {"attention_mask": inputs["attention_mask"]}


@dataclass(frozen=True)
class TileFamily(VisionFamily):
    """Images are cut into tiles; rows of fewer tiles are filled up with empty ones, as processors do."""

    make_processor: Callable[..., Any] = tile_processor
    make_tokenizer: Callable[[], Any] = make_tile_tokenizer
    image_token: int = TILE_IMAGE_TOKEN
    placeholder: str = "<image>"
    language_model: str = "text_model"

    def inputs(self, prompt: Any, images: Sequence[Image.Image]) -> Inputs:
        """Of a text alone, which transformers' own processor makes tokens of."""
        processor = Idefics3Processor(idefics3_processor(), make_tile_tokenizer(), image_seq_len=TILE_TOKENS)
        return dict(processor(text=[prompt], images=[list(images)] if images else None, return_tensors="pt"))

    def _random_lengths(self, images: int) -> list[int]:
        """Of two tiles and of one, in turns."""
        return [TILE_TOKENS * (2 - number % 2) for number in range(images)]

    def _random_pixels(self, images_a_row: Sequence[int], generator: torch.Generator, ids: torch.Tensor) -> Inputs:
        tiles = ((ids == self.image_token).sum(dim=1) // TILE_TOKENS).tolist()
        pixels = torch.zeros(len(ids), max(tiles), 3, TILE_EDGE, TILE_EDGE)
        for row, count in enumerate(tiles):
            pixels[row, :count] = torch.randn(count, 3, TILE_EDGE, TILE_EDGE, generator=generator)
        return {"pixel_values": pixels}

    def _encode(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        tiles = inputs["pixel_values"].flatten(0, 1)
        real = tiles[tiles.abs().sum(dim=(1, 2, 3)) > 0]
        return model.model.connector(model.model.vision_model(real).last_hidden_state), {}


@dataclass(frozen=True)
class PrefixFamily(VisionFamily):
    """A prompt attends in both directions and its images stand in front."""

    make_processor: Callable[..., Any] = siglip_processor
    make_tokenizer: Callable[[], Any] = make_prefix_tokenizer
    image_token: int = PREFIX_IMAGE_TOKEN
    placeholder: str = "<image>"
    rounding: float = 1e-4

    def inputs(self, prompt: Any, images: Sequence[Image.Image]) -> Inputs:
        """Of what people write, which transformers' own processor makes a prompt of."""
        if images:
            image_processor = siglip_processor()
            image_processor.image_seq_length = IMAGE_TOKENS
            processor = PaliGemmaProcessor(image_processor, make_prefix_tokenizer())
            row = dict(processor(text=[prompt], images=[list(images)], return_tensors="pt"))
            del row["labels"]
            return row
        # The processor takes no text alone; the model does, as any prompt.
        ids = make_prefix_tokenizer()(f"<bos>{prompt}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    def random_inputs(self, images_a_row: Sequence[int] = (1, 2, 0), seed: int = 3) -> Inputs:
        """Rows of images, words and a completion of three tokens; each has its own length of prompt."""
        generator, rows = torch.Generator().manual_seed(seed), []
        for number, count in enumerate(images_a_row):
            words = torch.randint(3, PREFIX_IMAGE_TOKEN, (7 + number,), generator=generator)
            rows.append(torch.cat([torch.full((count * IMAGE_TOKENS,), PREFIX_IMAGE_TOKEN), words]))
        inputs = pad_left(rows)
        types = (torch.arange(inputs["input_ids"].shape[1]) >= inputs["input_ids"].shape[1] - 3).long()
        pixels = self._random_pixels(images_a_row, generator, inputs["input_ids"])
        return inputs | {"token_type_ids": types.expand_as(inputs["input_ids"])} | pixels

    def _look_up(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        return model.get_input_embeddings().weight[ids] * HIDDEN_SIZE**0.5

    def _encode(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        return model.model.multi_modal_projector(model.model.vision_tower(inputs["pixel_values"]).last_hidden_state), {}

    def _places(self, inputs: Inputs) -> dict[str, Any]:
        """A mask made here: all of a prompt sees all of it, what follows is causal."""
        real, is_prompt = inputs["attention_mask"].bool(), inputs["token_type_ids"] == 0
        place = torch.arange(real.shape[1])
        visible = (place[None, :] <= place[:, None])[None] | (is_prompt[:, :, None] & is_prompt[:, None, :])
        return {"attention_mask": torch.where(visible & real[:, None, :], 0.0, MASKED)[:, None]}


@dataclass(frozen=True)
class PatchFamily(VisionFamily):
    """Images keep their shape, and positions follow their grid of pieces."""

    make_processor: Callable[..., Any] = patch_processor
    rounding: float = 2e-5

    # Rows and columns of pieces.
    GRIDS = ((3, 5), (2, 2), (4, 1))

    def inputs(self, prompt: Any, images: Sequence[Image.Image]) -> Inputs:
        tokens = self.make_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        pixels = dict(patch_processor()(images=list(images), return_tensors="pt")) if images else {}
        left = iter([int(grid.prod()) // 4 for grid in pixels.get("image_grid_thw", ())])
        row = torch.tensor([[t for token in tokens for t in [token] * (next(left, 1) if token == IMAGE_TOKEN else 1)]])
        types = {"mm_token_type_ids": (row == IMAGE_TOKEN).int()} if images else {}
        return {"input_ids": row, "attention_mask": torch.ones_like(row), **pixels, **types}

    def _random_lengths(self, images: int) -> list[int]:
        return [high * wide for high, wide in self.GRIDS[:images]]

    def _random_pixels(self, images_a_row: Sequence[int], generator: torch.Generator, ids: torch.Tensor) -> Inputs:
        sizes = torch.tensor([[1, 2 * high, 2 * wide] for high, wide in self.GRIDS[: sum(images_a_row)]])
        pixels = torch.randn(int(sizes.prod(dim=1).sum()), 3 * 2 * PATCH_EDGE**2, generator=generator)
        types = (ids == self.image_token).int()
        return {"pixel_values": pixels, "image_grid_thw": sizes, "mm_token_type_ids": types}

    def _encode(self, model: Any, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        """Each image through the tower alone."""
        sizes = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].split(sizes.prod(dim=1).tolist())
        features = [model.model.visual(image, size[None]) for image, size in zip(pixels, sizes, strict=True)]
        more = {}
        if hasattr(features[0], "deepstack_features"):
            deep = [torch.cat(layer) for layer in zip(*(each.deepstack_features for each in features), strict=True)]
            more = {"visual_pos_masks": inputs["input_ids"] == self.image_token, "deepstack_visual_embeds": deep}
        return torch.cat([each.pooler_output for each in features]), more

    def _places(self, inputs: Inputs) -> dict[str, Any]:
        grids = [(high // 2, wide // 2) for _, high, wide in inputs.get("image_grid_thw", torch.zeros(0, 3)).tolist()]
        return super()._places(inputs) | {"position_ids": self.positions_by_hand(inputs, grids)}

    def positions_by_hand(self, inputs: Inputs, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Shape ``(3, batch, seq)``, token by token; ``grids`` of the images in the order of the rows."""
        ids, mask, left = inputs["input_ids"], inputs["attention_mask"], list(grids)
        result = torch.zeros(3, *ids.shape, dtype=torch.int64)
        for row in range(len(ids)):
            following, column = 0, int(mask[row].argmax())
            while column < ids.shape[1]:
                if ids[row, column] == self.image_token and left:
                    high, wide = left.pop(0)
                    for down in range(high):
                        for across in range(wide):
                            where = torch.tensor([following, following + down, following + across])
                            result[:, row, column + down * wide + across] = where
                    column, following = column + high * wide, following + max(high, wide)
                else:
                    result[:, row, column] = following
                    column, following = column + 1, following + 1
        return result


FAMILIES: dict[str, VisionFamily] = {
    "llava": VisionFamily(llava),
    "fast_vlm": VisionFamily(fast_vlm),
    "idefics3": TileFamily(idefics3, idefics3_processor),
    "smolvlm": TileFamily(smolvlm),
    "paligemma": PrefixFamily(paligemma),
    "qwen2_vl": PatchFamily(qwen2_vl),
    "qwen2_5_vl": PatchFamily(qwen2_5_vl),
    "qwen3_vl": PatchFamily(qwen3_vl),
}
TILES = [name for name, family in FAMILIES.items() if isinstance(family, TileFamily)]
PATCHES = [name for name, family in FAMILIES.items() if isinstance(family, PatchFamily)]
