"""Level 7: images. Pixel values, the vision tower's embeddings, and what the engine makes of prompts with pictures."""

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
from adalink.tools.parity.check_outputs import TYPICAL_PERCENTILE, worst_of
from adalink.tools.parity.reference import Pixels, Reference, limit_of
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

# Height and width: smaller and larger than most towers', upright and lying, odd.
_SIZES = ((37, 53), (481, 320), (224, 224), (511, 700))
# Tiles that the tower is compared on: in float64 one is many times the work of a text.
_TILES = 8
# Likewise, pictures that are taken as patches: a smaller and a larger one than a window.
_PATCHED = 2
# Rescaling, subtracting the mean, dividing: each rounds once, and so does the processor.
_PIXEL_ROUNDINGS = 6


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts with images, and both sides' ways to see them.

    Attributes:
        prompts: token ids, one placeholder for each image.
        rows: the same, with placeholders for all that the images take up.
        pictures: those of each row, uint8 with shape ``(height, width, 3)``.
        pixels: likewise as the model's own processor prepares them; ``None`` for a row without images.
    """

    prompts: list[list[int]]
    rows: list[list[int]]
    pictures: list[list[Array]]
    pixels: list[Pixels | None]

    def pick(self, indices: Iterable[int]) -> ImagePrompts:
        """Some of the rows."""
        rows = list(zip(self.prompts, self.rows, self.pictures, self.pixels, strict=True))
        prompts, ids, pictures, pixels = zip(*(rows[index] for index in indices), strict=True)
        return ImagePrompts(list(prompts), list(ids), list(pictures), list(pixels))

    def with_text(self, ids: list[int]) -> ImagePrompts:
        """These rows, and one without images."""
        return ImagePrompts([*self.prompts, ids], [*self.rows, ids], [*self.pictures, []], [*self.pixels, None])


class ReferenceProcessor:
    """Pictures as the model's own code prepares them, and what it writes in a prompt for each."""

    def __init__(
        self, processor: BaseImageProcessor, vision: Vision, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """The tokenizer is for models that take tiles: their tokens come from transformers' own text of a picture."""
        self._processor, self._vision, self._tokenizer = processor, vision, tokenizer

    def pixels(self, pictures: Sequence[Array]) -> dict[str, Array]:
        """The pictures of one row as the model takes them.

        Returns:
            ``pixel_values``, float32 with shape ``(images, 3, height, width)``; for a model that takes tiles
            ``(1, tiles, 3, height, width)``; for one that takes patches ``(patches, numbers)``, and beside them
            ``image_grid_thw``, int64 with shape ``(images, 3)``.
        """
        given = self._processor(images=list(pictures), return_tensors="np")
        found = {"pixel_values": np.asarray(given["pixel_values"], np.float32)}
        return found if self._vision.patches is None else found | {"image_grid_thw": given["image_grid_thw"]}

    def tokens(self, picture: Array) -> list[int]:
        """What stands for a picture in a prompt."""
        image, count = self._vision.image_token_id, self._vision.tokens_per_image
        if self._vision.patches is not None:
            return [image] * int(self.pixels([picture])["image_grid_thw"].prod() // self._vision.patches.merge**2)
        if self._vision.tiles is None:
            return [image] * count
        assert self._tokenizer is not None
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        cut = self._processor(images=[picture], return_tensors="np", return_row_col_info=True)
        text = get_image_prompt_string(
            cut["rows"][0][0],
            cut["cols"][0][0],
            count,
            fake_token_around_image=getattr(self._tokenizer, "fake_image_token", "<fake_token_around_image>"),
            image_token=self._tokenizer.convert_ids_to_tokens(image),
            global_image_token=getattr(self._tokenizer, "global_image_token", "<global-img>"),
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def make_image_prompts(
    deployment: Deployment, rows: Sequence[list[int]], longest: int, images: ReferenceProcessor
) -> ImagePrompts | None:
    """Rows of text with one image, and with two where they fit; ``None`` where an image alone is too long.

    Args:
        deployment: what is verified; it has a vision tower.
        rows: token ids of texts.
        longest: positions that a row may have.
        images: the model's own way with pictures.
    """
    vision = vision_base(deployment.manifest.base).vision
    found = ImagePrompts([], [], [], [])
    pictures = [_picture(seed, *size) for seed, size in enumerate(_SIZES)]
    for index in range(len(pictures) // 2):
        chosen = pictures[2 * index : 2 * index + 1 + index]
        words = [token for token in rows[index % len(rows)] if token != vision.image_token_id]
        words = words or [deployment.manifest.base.pad_token_id]
        # By placeholders alone the model does not tell pictures of several grids apart.
        between = words[:1] if vision.patches is not None else []
        written = [token for picture in chosen for token in (*images.tokens(picture), *between)]
        room = longest - len(written)
        if room < 2:
            break
        words = words[:room]
        found.prompts.append([words[0], *[vision.image_token_id, *between] * len(chosen), *words[1:]])
        found.rows.append([words[0], *written, *words[1:]])
        found.pictures.append(chosen)
        found.pixels.append(images.pixels(chosen))
    return found if found.rows else None


def check_vision(deployment: Deployment, reference: Reference, images: ReferenceProcessor) -> list[Check]:
    """Preprocessing against the model's own processor, and the vision graph against PyTorch, on the same pixels.

    Where pictures are cut into tiles, also the tokens around them.
    """
    base = deployment.manifest.base
    vision = vision_base(base).vision
    steps = read_preprocessor(
        read_verified(deployment.path, deployment.manifest, vision.preprocessor), vision.preprocessor
    )
    pictures = [_picture(seed, *size) for seed, size in enumerate(_SIZES)]
    prepared = images.pixels(pictures)
    theirs = prepared["pixel_values"]
    if vision.patches is None:
        theirs = theirs.reshape(-1, *theirs.shape[-3:])
    ours = np.concatenate([steps.apply(read_image(picture, "picture")) for picture in pictures])
    part, parts = ("tile", "tiles") if vision.patches is None else ("patch", "patches")
    if theirs.shape != ours.shape:
        raise ContractError(
            f"the image processor of the model gives {len(theirs)} {parts} of {theirs.shape[1:]} for {len(pictures)} "
            f"pictures, that of the deployment {len(ours)} of {ours.shape[1:]}: verify it against the model it was "
            "made from"
        )
    offset = 0.0 if steps.mean is None or steps.std is None else max(map(abs, np.divide(steps.mean, steps.std)))
    allowed = _PIXEL_ROUNDINGS * UNIT_ROUNDOFF["float32"] * (float(np.abs(theirs).max()) + offset)
    differing = f"|Δ| over {len(pictures)} pictures of odd sizes, against the model's own image processor"
    checks = [at_most("vision/pixel-values", float(np.abs(ours - theirs).max()), allowed, differing)]
    grids = [steps.grid(*picture.shape[:2]) for picture in pictures]
    if vision.tiles is not None or vision.patches is not None:
        wrong = [
            index
            for index, (picture, grid) in enumerate(zip(pictures, grids, strict=True))
            if vision.image_tokens(grid) != images.tokens(picture)
        ]
        said = f"of {len(pictures)} pictures of odd sizes, of rows and columns {grids}; differing: {wrong}"
        checks.append(at_most(f"vision/{part}-tokens", len(wrong), 0, said))
    if vision.patches is None:
        few: Pixels = {"pixel_values": prepared["pixel_values"][..., :_TILES, :, :, :]}
        received = _through_tower(deployment, few["pixel_values"])
    else:
        few = images.pixels(pictures[:_PATCHED])
        counts = few["image_grid_thw"].prod(axis=1)
        own = np.split(few["pixel_values"], np.cumsum(counts)[:-1])
        received = [deployment.encode_images(pixels, grid) for pixels, grid in zip(own, grids[:_PATCHED], strict=True)]
    expected, noise = reference.image_embeds(few)
    typical = float(np.percentile(np.concatenate(noise), TYPICAL_PERCENTILE))
    deviations = [np.abs(own - right).max(axis=1) for own, right in zip(received, expected, strict=True)]
    deviation, limit, picture, position = worst_of(deviations, [limit_of(own, typical, "float32") for own in noise])
    nearest = (
        f"|Δ| nearest its limit, of {sum(map(len, received))} positions: picture {picture}, position "
        f"{position}; PyTorch float32 is itself typically {typical:.1e} away"
    )
    return [*checks, at_most("vision/image-embeds", deviation, limit, nearest)]


def _through_tower(deployment: Deployment, pixels: Array) -> list[Array]:
    """Embeddings ``(positions, d)`` of each image, or of each row of tiles."""
    embeds = deployment.encode_images(pixels.reshape(-1, *pixels.shape[-3:]))
    return list(embeds.reshape(len(pixels), -1, embeds.shape[-1]))


def check_tower_profile_limits(deployment: Deployment, reference: Reference, images: ReferenceProcessor) -> list[Check]:
    """Level 6 of a compiled vision tower: as few images a call as its profile allows, and as many; none for others."""
    span = None if deployment.profile is None else deployment.profile.images
    if span is None:
        return []
    pixels = images.pixels([_picture(seed, *size) for seed, size in enumerate(_SIZES[:2])])["pixel_values"]
    pixels = pixels[..., :2, :, :, :]
    expected, noise = (np.stack(found) for found in reference.image_embeds({"pixel_values": pixels}))
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
    """How the model that is verified against takes pictures; raises ``ContractError`` if it has no processor."""
    from adalink.training.models.loading import find_image_processor, load_tokenizer

    processor = find_image_processor(against)
    if processor is None:
        raise ContractError(
            f"{against} has no image processor and the deployment takes images: verify it against the model it was "
            "made from, with its preprocessor_config.json"
        )
    return ReferenceProcessor(processor, vision, None if vision.tiles is None else load_tokenizer(against))


def _picture(seed: int, height: int, width: int) -> Array:
    """Half smooth, half noise: filters and edges show."""
    rng = np.random.default_rng([11, seed])
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = (rows * 3 + columns * 2)[..., None] + np.array([0, 60, 120])
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where((columns < width // 2)[..., None], smooth % 256, noise).astype(np.uint8)
