"""Level 7: images. Pixel values, the vision tower's embeddings, and what the engine makes of prompts with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adalink.export.bounds import UNIT_ROUNDOFF, Float64
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Array
from adalink.runtime.errors import ContractError
from adalink.runtime.integrity import locate, read_verified
from adalink.runtime.onnxruntime_vision import OnnxVisionGraph
from adalink.runtime.pictures import read_picture
from adalink.runtime.preprocess import read_preprocessor
from adalink.tools.parity.outputs import TYPICAL_PERCENTILE, worst_of
from adalink.tools.parity.reference import Reference, limit_of
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

# Height and width: smaller and larger than most towers', upright and lying, odd.
_SIZES = ((37, 53), (481, 320), (224, 224), (511, 700))
# Rescaling, subtracting the mean, dividing: each rounds once, and so does the processor.
_PIXEL_ROUNDINGS = 6


@dataclass(frozen=True)
class Looks:
    """Prompts with images, and both sides' ways to see them.

    Attributes:
        rows: token ids, placeholders for all that the images take up.
        pictures: those of each row, uint8 with shape ``(height, width, 3)``.
        pixels: likewise as the model's own processor prepares them, ``(images, 3, height, width)``.
    """

    rows: list[list[int]]
    pictures: list[list[Array]]
    pixels: list[Array]


def make_looks(
    deployment: Deployment, rows: Sequence[list[int]], longest: int, processor: BaseImageProcessor
) -> Looks | None:
    """Rows of text with one image, and with two where they fit; ``None`` where an image alone is too long.

    Args:
        deployment: what is verified; it has a vision tower.
        rows: token ids of texts.
        longest: positions that a row may have.
        processor: the model's own.
    """
    vision = deployment.manifest.base.vision
    assert vision is not None
    found = Looks([], [], [])
    pictures = [_picture(seed, *size) for seed, size in enumerate(_SIZES)]
    for index in range(len(pictures) // 2):
        own = pictures[2 * index : 2 * index + 1 + index]
        words = [token for token in rows[index % len(rows)] if token != vision.image_token_id]
        room = longest - len(own) * vision.tokens_per_image
        if room < 2:
            break
        words = (words or [deployment.manifest.base.pad_token_id])[:room]
        tokens = [words[0]]
        for _ in own:
            tokens += [vision.image_token_id] * vision.tokens_per_image
        found.rows.append([*tokens, *words[1:]])
        found.pictures.append(own)
        found.pixels.append(np.asarray(processor(images=own, return_tensors="np")["pixel_values"], np.float32))
    return found if found.rows else None


def check_vision(deployment: Deployment, reference: Reference, processor: BaseImageProcessor) -> list[Check]:
    """Preprocessing against the model's own processor, and the vision graph against PyTorch, on the same pixels."""
    base = deployment.manifest.base
    vision = base.vision
    assert vision is not None
    steps = read_preprocessor(
        read_verified(deployment.path, deployment.manifest, vision.preprocessor), vision.preprocessor
    )
    graph = OnnxVisionGraph(locate(deployment.path, vision.graph), vision, base.hidden_size, None)
    pictures = [_picture(seed, *size) for seed, size in enumerate(_SIZES)]
    theirs = np.asarray(processor(images=pictures, return_tensors="np")["pixel_values"], np.float32)
    ours = np.stack([steps.apply(read_picture(picture, "picture")) for picture in pictures])
    if theirs.shape != ours.shape:
        raise ContractError(
            f"the image processor of the model gives {theirs.shape[1:]}, that of the deployment {ours.shape[1:]}: "
            "verify it against the model it was made from"
        )
    offset = 0.0 if steps.mean is None or steps.std is None else max(map(abs, np.divide(steps.mean, steps.std)))
    allowed = _PIXEL_ROUNDINGS * UNIT_ROUNDOFF["float32"] * (float(np.abs(theirs).max()) + offset)
    differing = f"|Δ| over {len(pictures)} pictures of odd sizes, against the model's own image processor"
    expected, noise = reference.image_embeds(theirs)
    typical = float(np.percentile(noise, TYPICAL_PERCENTILE))
    received: Float64 = graph.run(theirs).astype(np.float64)
    deviations = [np.abs(own - right).max(axis=1) for own, right in zip(received, expected, strict=True)]
    deviation, limit, picture, position = worst_of(deviations, [limit_of(own, typical, "float32") for own in noise])
    nearest = (
        f"|Δ| nearest its limit, of {received.shape[0] * received.shape[1]} positions: picture {picture}, position "
        f"{position}; PyTorch float32 is itself typically {typical:.1e} away"
    )
    return [
        at_most("vision/pixel-values", float(np.abs(ours - theirs).max()), allowed, differing),
        at_most("vision/image-embeds", deviation, limit, nearest),
    ]


def own_processor(against: str) -> BaseImageProcessor:
    """The image processor of the model that is verified against; raises ``ContractError`` if it has none."""
    from adalink.export.vision import find_image_processor

    processor = find_image_processor(against)
    if processor is None:
        raise ContractError(
            f"{against} has no image processor and the deployment takes images: verify it against the model it was "
            "made from, with its preprocessor_config.json"
        )
    return processor


def _picture(seed: int, height: int, width: int) -> Array:
    """Half smooth, half noise: filters and edges show."""
    rng = np.random.default_rng([11, seed])
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = (rows * 3 + columns * 2)[..., None] + np.array([0, 60, 120])
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where((columns < width // 2)[..., None], smooth % 256, noise).astype(np.uint8)
