"""Vision tower of an open deployment, with a cache of image embeddings; opened with the first image.

Adapters act after the tower, so the embeddings of an image are the same for every task. The cache is keyed by the
preprocessed image and shared by all tasks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import Backend, PatchVisionGraph, VisionGraph
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.finite import check_image_embeds
from adalink.runtime.logs import get_logger
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.integrity import locate, read_verified, verify_files
from adalink.runtime.storage.lru import LruTable
from adalink.runtime.storage.manifest import Manifest, Variant, Vision
from adalink.runtime.storage.verification_cache import verify_once
from adalink.runtime.storage.vision_base import vision_base
from adalink.runtime.storage.vision_schema import Grid
from adalink.runtime.vision.images import ImageInput, read_image
from adalink.runtime.vision.placeholders import ImageEmbeds, PreprocessedImage
from adalink.runtime.vision.preprocess import Preprocessor, read_preprocessor

_LOG = get_logger(__name__)


class OpenVision:
    """Image processing of a deployment; safe for several threads, whose calls it serialises."""

    def __init__(self, path: Path, manifest: Manifest, variant: Variant, backend: Backend, cache_bytes: int) -> None:
        """``backend`` opens the tower's plan of ``variant`` if there is one, or else the base's graph."""
        self._path, self._manifest, self._variant, self._backend = path, manifest, variant, backend
        self._cache_bytes = cache_bytes
        self._kept: LruTable[str, Array] = LruTable(cache_bytes)
        self._opened: tuple[Preprocessor, _Tower] | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self.encoded = 0

    def prepare(self, images: Sequence[Sequence[ImageInput]]) -> list[list[PreprocessedImage]]:
        """Read and preprocess the images of each row.

        Args:
            images: the images of each row; only for a base with a vision tower.

        Raises:
            RequestError: an image cannot be read.
            IntegrityError: a file of the vision tower differs from the manifest.
            BackendError: the tower's engine is not available, or refused.
        """
        with self._lock:
            preprocessor, _ = self._open()
        preprocessed: list[list[PreprocessedImage]] = []
        for row, row_images in enumerate(images):
            preprocessed.append([])
            for number, source in enumerate(row_images):
                pixels = read_image(source, f"images[{row}][{number}]")
                values = preprocessor.apply(pixels)
                grid = preprocessor.grid(pixels.shape[0], pixels.shape[1])
                # Patches of one colour are the same in any grid.
                preprocessed[-1].append(PreprocessedImage(f"{digest_bytes(values.data)} {grid}", values, grid))
        return preprocessed

    def embed(self, images: Sequence[Sequence[PreprocessedImage]]) -> list[list[ImageEmbeds]]:
        """Image embeddings of each row, from the cache where possible; raises what ``prepare`` does."""
        with self._lock:
            _, tower = self._open()
            by_digest = {image.digest: image for row_images in images for image in row_images}
            kept = self._kept.entries
            embeds = {digest: kept[digest].value for digest in by_digest if digest in kept}
            missing = [image for digest, image in by_digest.items() if digest not in embeds]
            if missing:
                begun = time.perf_counter()
                for image, image_embeds in zip(missing, tower.encode(missing), strict=True):
                    embeds[image.digest] = image_embeds
                self.encoded += len(missing)
                spent_ms = (time.perf_counter() - begun) * 1000
                _LOG.info("encoded %d of %d images, %.0f ms", len(missing), len(by_digest), spent_ms)
            for digest in embeds:
                self._keep(digest, embeds[digest])
            return [
                [ImageEmbeds(image.digest, embeds[image.digest], image.grid) for image in row_images]
                for row_images in images
            ]

    def encode(self, pixel_values: Array, grid: Grid | None) -> Array:
        """See ``Deployment.encode_images``."""
        base = vision_base(self._manifest.base)
        shape, expected = np.shape(pixel_values), (3, *base.vision.image_size)
        if base.vision.patches is not None:
            patches = None if grid is None else base.vision.positions(grid) * base.vision.patches.merge**2
            if grid is None or len(shape) != 2 or shape[0] != patches:
                raise RequestError(f"pixel_values has the shape {shape} and grid is {grid}: expected all its patches")
        elif len(shape) != 4 or not shape[0] or shape[1:] != expected:
            raise RequestError(f"pixel_values has the shape {shape}, expected one or more images of {expected}")
        with self._lock:
            return self._open()[1].run(pixel_values, grid or (0, 0))

    def close(self) -> None:
        """Free its memory."""
        with self._lock:
            self._is_closed = True
            if self._opened is not None:
                self._opened[1].close()
            self._opened = None
            self._kept.clear()

    def _open(self) -> tuple[Preprocessor, _Tower]:
        if self._is_closed:
            raise RequestError("the deployment is closed: open it again")
        if self._opened is None:
            base, plan = vision_base(self._manifest.base), self._variant.vision_graph
            vision = base.vision
            if plan is None:
                verified = verify_once(self._path, self._manifest, vision.files)
            else:  # a plan is code: read in full, and now, since it may have changed since the engine's was
                verified = verify_files(self._path, self._manifest, self._variant.files)
            steps = read_preprocessor(
                read_verified(self._path, self._manifest, vision.preprocessor), vision.preprocessor
            )
            _check_tiles(steps, vision)
            graph = locate(self._path, plan or vision.graph)
            tower: _Tower
            if vision.patches is None:
                tower = _TileTower(self._backend.open_vision(graph, base))
            else:
                tower = _PatchTower(self._backend.open_patch_vision(graph, base, vision.patches))
            verified.check_unchanged(undo=tower.close)
            self._opened = steps, tower
        return self._opened

    def _keep(self, digest: str, embeds: Array) -> None:
        """Cache embeddings, unless they alone exceed the budget."""
        if embeds.nbytes <= self._cache_bytes:
            self._kept.put(digest, embeds, embeds.nbytes)


class _Tower(Protocol):
    """A vision tower, for images of one size or of any shape."""

    def run(self, pixel_values: Array, grid: Grid) -> Array:
        """See ``Deployment.encode_images``; ``grid`` is used where images keep their shape."""
        ...

    def encode(self, images: Sequence[PreprocessedImage]) -> list[Array]:
        """Embeddings of each image, ``(positions, d)``."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class _TileTower:
    """Images or tiles of one size, many in a call."""

    def __init__(self, graph: VisionGraph) -> None:
        self._graph = graph

    def run(self, pixel_values: Array, grid: Grid) -> Array:
        """Embeddings of any number of tiles, shape ``(tiles, tokens, d)``, in one or more calls."""
        most = self._graph.most_images
        starts = range(0, len(pixel_values), most)
        embeds = [self._graph.run(pixel_values[start : start + most]) for start in starts]
        return check_image_embeds(np.concatenate(embeds))

    def encode(self, images: Sequence[PreprocessedImage]) -> list[Array]:
        embeds = self.run(np.concatenate([image.pixel_values for image in images]), (0, 0))
        ends = np.cumsum([len(image.pixel_values) for image in images])[:-1]
        # Copies: a cached image must not keep the whole batch in memory.
        return [image_embeds.reshape(-1, image_embeds.shape[-1]).copy() for image_embeds in np.split(embeds, ends)]

    def close(self) -> None:
        self._graph.close()


class _PatchTower:
    """Images that keep their shape, one in a call."""

    def __init__(self, graph: PatchVisionGraph) -> None:
        self._graph = graph

    def run(self, pixel_values: Array, grid: Grid) -> Array:
        return check_image_embeds(self._graph.run(pixel_values, grid))

    def encode(self, images: Sequence[PreprocessedImage]) -> list[Array]:
        return [self.run(image.pixel_values, image.grid) for image in images]

    def close(self) -> None:
        self._graph.close()


def _check_tiles(steps: Preprocessor, vision: Vision) -> None:
    """Check that tiles and patches match the manifest, which has their tokens; raises ``IntegrityError``."""
    pieces = None if vision.patches is None else (vision.image_size, vision.patches.merge)
    cut = steps.patching
    if pieces != (None if cut is None else ((cut.edge * cut.merge,) * 2, cut.merge)):
        raise IntegrityError(
            f"{vision.preprocessor} cuts images into patches by {cut}, the manifest expects {pieces} (the size of "
            "pieces, patches on an edge): export the base again"
        )
    expected = None if vision.tiles is None else (vision.image_size, len(vision.tiles.before_tile))
    received = None if steps.tiling is None else ((steps.tiling.edge, steps.tiling.edge), steps.tiling.most)
    if received != expected:
        raise IntegrityError(
            f"{vision.preprocessor} cuts images into tiles of {received}, the manifest has tokens for {expected} "
            "(their size, most in a row): export the base again"
        )
    if steps.tiling is None and cut is None and steps.output_size != vision.image_size:
        raise IntegrityError(
            f"{vision.preprocessor} gives pictures of {steps.output_size or 'any size'}, the manifest says "
            f"{vision.image_size}: export the base again"
        )
