"""Level 7, images: pixel values, the vision tower's embeddings, and prompts with images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adalink.export.adapter.error_bound import UNIT_ROUNDOFF
from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ContractError
from adalink.runtime.storage.integrity import read_verified
from adalink.runtime.storage.manifest import Vision
from adalink.runtime.storage.vision_base import vision_base
from adalink.runtime.vision.images import read_image
from adalink.runtime.vision.preprocess import read_preprocessor
from adalink.tools.parity.checks.outputs import worst_of
from adalink.tools.parity.reference.images import Pixels
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import TYPICAL_PERCENTILE, limit_of
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

# Height and width: smaller and larger than most towers' inputs, portrait and landscape, odd numbers.
_SIZES = ((37, 53), (481, 320), (224, 224), (511, 700))
# Tiles to compare the tower on: in float64 one tile costs many times a text.
_TILES = 8
# Likewise images of a patch model: one smaller than an attention window, and one larger.
_PATCHED = 2
# Rescaling, subtracting the mean and dividing round once each, on both sides.
_PIXEL_ROUNDINGS = 6


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts with images, for the deployment and for PyTorch.

    Attributes:
        prompts: token ids of each row, with one placeholder for each image.
        rows: the same, with one placeholder for each position of an image.
        images: images of each row, uint8 with shape ``(height, width, 3)``.
        pixels: images of each row from the model's own processor; ``None`` for a row without images.
    """

    prompts: list[list[int]]
    rows: list[list[int]]
    images: list[list[Array]]
    pixels: list[Pixels | None]

    def pick(self, indices: Iterable[int]) -> ImagePrompts:
        """Some of the rows."""
        rows = list(zip(self.prompts, self.rows, self.images, self.pixels, strict=True))
        prompts, ids, images, pixels = zip(*(rows[index] for index in indices), strict=True)
        return ImagePrompts(list(prompts), list(ids), list(images), list(pixels))

    def with_text(self, ids: list[int]) -> ImagePrompts:
        """These rows, and one without images."""
        return ImagePrompts([*self.prompts, ids], [*self.rows, ids], [*self.images, []], [*self.pixels, None])


class ReferenceProcessor:
    """The model's own image processor: pixel values, and the tokens of an image in a prompt."""

    def __init__(
        self, processor: BaseImageProcessor, vision: Vision, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """The tokenizer is for models with tiles, whose image tokens come from a text that transformers makes."""
        self._processor, self._vision, self._tokenizer = processor, vision, tokenizer

    def pixels(self, images: Sequence[Array]) -> dict[str, Array]:
        """Inputs of the model for the images of one row.

        Returns:
            ``pixel_values``, float32 with shape ``(images, 3, height, width)``; for a model that takes tiles
            ``(1, tiles, 3, height, width)``; for one that takes patches ``(patches, numbers)``, and beside them
            ``image_grid_thw``, int64 with shape ``(images, 3)``.
        """
        outputs = self._processor(images=list(images), return_tensors="np")
        pixels = {"pixel_values": np.asarray(outputs["pixel_values"], np.float32)}
        return pixels if self._vision.patches is None else pixels | {"image_grid_thw": outputs["image_grid_thw"]}

    def tokens(self, image: Array) -> list[int]:
        """Tokens of an image in a prompt."""
        placeholder, count = self._vision.image_token_id, self._vision.tokens_per_image
        if self._vision.patches is not None:
            return [placeholder] * int(self.pixels([image])["image_grid_thw"].prod() // self._vision.patches.merge**2)
        if self._vision.tiles is None:
            return [placeholder] * count
        assert self._tokenizer is not None
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        cut = self._processor(images=[image], return_tensors="np", return_row_col_info=True)
        text = get_image_prompt_string(
            cut["rows"][0][0],
            cut["cols"][0][0],
            count,
            fake_token_around_image=getattr(self._tokenizer, "fake_image_token", "<fake_token_around_image>"),
            image_token=self._tokenizer.convert_ids_to_tokens(placeholder),
            global_image_token=getattr(self._tokenizer, "global_image_token", "<global-img>"),
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def make_image_prompts(
    deployment: Deployment, rows: Sequence[list[int]], longest: int, processor: ReferenceProcessor
) -> ImagePrompts | None:
    """Rows of text with one image, and with two where they fit; ``None`` where an image alone is too long.

    Args:
        deployment: the deployment to verify; it has a vision tower.
        rows: token ids of texts.
        longest: most positions of a row.
        processor: the model's own image processor.
    """
    vision = vision_base(deployment.manifest.base).vision
    image_prompts = ImagePrompts([], [], [], [])
    images = [_seeded_image(seed, *size) for seed, size in enumerate(_SIZES)]
    for index in range(len(images) // 2):
        chosen = images[2 * index : 2 * index + 1 + index]
        words = [token for token in rows[index % len(rows)] if token != vision.image_token_id]
        words = words or [deployment.manifest.base.pad_token_id]
        # From placeholders alone the model cannot tell images with several grids apart.
        between = words[:1] if vision.patches is not None else []
        image_tokens = [token for image in chosen for token in (*processor.tokens(image), *between)]
        text_tokens = longest - len(image_tokens)
        if text_tokens < 2:
            break
        words = words[:text_tokens]
        image_prompts.prompts.append([words[0], *[vision.image_token_id, *between] * len(chosen), *words[1:]])
        image_prompts.rows.append([words[0], *image_tokens, *words[1:]])
        image_prompts.images.append(chosen)
        image_prompts.pixels.append(processor.pixels(chosen))
    return image_prompts if image_prompts.rows else None


def check_vision(deployment: Deployment, reference: Reference, processor: ReferenceProcessor) -> list[Check]:
    """Preprocessing against the model's own processor, and the vision graph against PyTorch, on the same pixels.

    Where images are cut into tiles or patches, also their tokens.
    """
    base = deployment.manifest.base
    vision = vision_base(base).vision
    steps = read_preprocessor(
        read_verified(deployment.path, deployment.manifest, vision.preprocessor), vision.preprocessor
    )
    images = [_seeded_image(seed, *size) for seed, size in enumerate(_SIZES)]
    prepared = processor.pixels(images)
    theirs = prepared["pixel_values"]
    if vision.patches is None:
        theirs = theirs.reshape(-1, *theirs.shape[-3:])
    ours = np.concatenate([steps.apply(read_image(image, "image")) for image in images])
    part, parts = ("tile", "tiles") if vision.patches is None else ("patch", "patches")
    if theirs.shape != ours.shape:
        raise ContractError(
            f"the image processor of the model gives {len(theirs)} {parts} of {theirs.shape[1:]} for {len(images)} "
            f"images, that of the deployment {len(ours)} of {ours.shape[1:]}: verify it against the model it was "
            "made from"
        )
    offset = 0.0 if steps.mean is None or steps.std is None else max(map(abs, np.divide(steps.mean, steps.std)))
    allowed = _PIXEL_ROUNDINGS * UNIT_ROUNDOFF["float32"] * (float(np.abs(theirs).max()) + offset)
    differing = f"|Δ| over {len(images)} images of odd sizes, against the model's own image processor"
    checks = [at_most("vision/pixel-values", float(np.abs(ours - theirs).max()), allowed, differing)]
    grids = [steps.grid(*image.shape[:2]) for image in images]
    if vision.tiles is not None or vision.patches is not None:
        wrong = [
            index
            for index, (image, grid) in enumerate(zip(images, grids, strict=True))
            if vision.image_tokens(grid) != processor.tokens(image)
        ]
        detail = f"of {len(images)} images of odd sizes, of rows and columns {grids}; differing: {wrong}"
        checks.append(at_most(f"vision/{part}-tokens", len(wrong), 0, detail))
    if vision.patches is None:
        few: Pixels = {"pixel_values": prepared["pixel_values"][..., :_TILES, :, :, :]}
        received = _through_tower(deployment, few["pixel_values"])
    else:
        few = processor.pixels(images[:_PATCHED])
        counts = few["image_grid_thw"].prod(axis=1)
        patches = np.split(few["pixel_values"], np.cumsum(counts)[:-1])
        received = [
            deployment.encode_images(pixels, grid) for pixels, grid in zip(patches, grids[:_PATCHED], strict=True)
        ]
    expected, noise = reference.image_embeds(few)
    typical = float(np.percentile(np.concatenate(noise), TYPICAL_PERCENTILE))
    deviations = [np.abs(ours - theirs).max(axis=1) for ours, theirs in zip(received, expected, strict=True)]
    limits = [limit_of(row, typical, "float32") for row in noise]
    deviation, limit, image_index, position = worst_of(deviations, limits)
    nearest = (
        f"|Δ| nearest its limit, of {sum(map(len, received))} positions: image {image_index}, position "
        f"{position}; PyTorch float32 is itself typically {typical:.1e} away"
    )
    return [*checks, at_most("vision/image-embeds", deviation, limit, nearest)]


def _through_tower(deployment: Deployment, pixels: Array) -> list[Array]:
    """Embeddings ``(positions, d)`` of each image, or of each row of tiles."""
    embeds = deployment.encode_images(pixels.reshape(-1, *pixels.shape[-3:]))
    return list(embeds.reshape(len(pixels), -1, embeds.shape[-1]))


def check_tower_profile_limits(
    deployment: Deployment, reference: Reference, processor: ReferenceProcessor
) -> list[Check]:
    """Level 6 of a compiled vision tower: the fewest and the most images a call that its profile takes."""
    span = None if deployment.profile is None else deployment.profile.images
    if span is None:
        return []
    pixels = processor.pixels([_seeded_image(seed, *size) for seed, size in enumerate(_SIZES[:2])])["pixel_values"]
    pixels = pixels[..., :2, :, :, :]
    expected, noise = (np.stack(rows) for rows in reference.image_embeds({"pixel_values": pixels}))
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    rows, typical = (len(flat), -1), float(np.percentile(noise, TYPICAL_PERCENTILE))
    right, limits = expected.reshape(*rows, expected.shape[-1]), limit_of(noise, typical, "float32").reshape(rows)
    checks = []
    for count in sorted({span.min, span.max}):
        order = np.arange(count) % len(flat)
        deviations = np.abs(deployment.encode_images(flat[order]) - right[order]).max(axis=2)
        deviation, limit, image, position = worst_of(list(deviations), list(limits[order]))
        nearest = f"|Δ| nearest its limit, of {count} images or tiles in one call: number {image}, position {position}"
        checks.append(at_most(f"profile/images={count}/image-embeds", deviation, limit, nearest))
    return checks


def reference_processor(against: str, vision: Vision) -> ReferenceProcessor:
    """The image processor of the model ``against``; raises ``ContractError`` if it has none."""
    from adalink.training.models.loading import load_tokenizer
    from adalink.training.models.vision import find_image_processor

    processor = find_image_processor(against)
    if processor is None:
        raise ContractError(
            f"{against} has no image processor and the deployment takes images: verify it against the model it was "
            "made from, with its preprocessor_config.json"
        )
    return ReferenceProcessor(processor, vision, None if vision.tiles is None else load_tokenizer(against))


def _seeded_image(seed: int, height: int, width: int) -> Array:
    """An image, half smooth and half noise, so that resizing filters and edges show."""
    rng = np.random.default_rng([11, seed])
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = (rows * 3 + columns * 2)[..., None] + np.array([0, 60, 120])
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where((columns < width // 2)[..., None], smooth % 256, noise).astype(np.uint8)
