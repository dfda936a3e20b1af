"""The vision tower of an open deployment: opened with the first image, run once for each picture.

What it gives for a picture is the same for every task, since adapters act behind it: embeddings are kept by what the
picture looks like to the tower, and one answers for all tasks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adalink.runtime.digest import digest_bytes
from adalink.runtime.engine import Array
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.integrity import locate, read_verified
from adalink.runtime.manifest import Manifest, Vision
from adalink.runtime.onnxruntime_patches import OnnxPatchGraph
from adalink.runtime.onnxruntime_vision import OnnxVisionGraph
from adalink.runtime.pictures import Picture, read_picture
from adalink.runtime.placeholders import ImageEmbeds, Prepared
from adalink.runtime.preprocess import Preprocessor, read_preprocessor
from adalink.runtime.verified import verify_once

# The tower's own working memory grows with the pixels of a call, and a call with more of them is hardly faster.
_PIXELS_AT_ONCE = 512 * 512

_Graph = OnnxVisionGraph | OnnxPatchGraph


class OpenVision:
    """The image side of a deployment; safe for calls from several threads, which it serves one after another."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None, cache_bytes: int) -> None:
        self._path, self._manifest, self._threads = path, manifest, threads
        self._cache_bytes = cache_bytes
        self._size_bytes = 0
        self._kept: OrderedDict[str, Array] = OrderedDict()
        self._opened: tuple[Preprocessor, _Graph] | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self.encoded = 0

    def prepare(self, images: Sequence[Sequence[Picture]]) -> list[list[Prepared]]:
        """The images of each row as the tower takes them.

        Args:
            images: those of each row; only for a base with a vision tower.

        Raises:
            RequestError: one is no picture.
            IntegrityError: a file of the vision tower is not the one in the manifest.
            BackendError: ONNX Runtime is not there, or refused.
        """
        with self._lock:
            preprocessor, _ = self._open()
        prepared: list[list[Prepared]] = []
        for row, own in enumerate(images):
            prepared.append([])
            for place, source in enumerate(own):
                picture = read_picture(source, f"images[{row}][{place}]")
                values = preprocessor.apply(picture)
                grid = preprocessor.grid(picture.shape[0], picture.shape[1])
                # Patches of one colour are the same in any grid.
                prepared[-1].append(Prepared(f"{digest_bytes(values.data)} {grid}", values, grid))
        return prepared

    def embed(self, images: Sequence[Sequence[Prepared]]) -> list[list[ImageEmbeds]]:
        """Embeddings of the images of each row; raises what ``prepare`` does."""
        with self._lock:
            _, graph = self._open()
            given = {image.digest: image for own in images for image in own}
            found = {digest: self._kept[digest] for digest in given if digest in self._kept}
            missing = [image for digest, image in given.items() if digest not in found]
            if missing:
                for image, own in zip(missing, _encode(graph, missing), strict=True):
                    found[image.digest] = own
                self.encoded += len(missing)
            for digest in found:
                self._keep(digest, found[digest])
            return [[ImageEmbeds(image.digest, found[image.digest], image.grid) for image in own] for own in images]

    def close(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._is_closed = True
            self._opened = None
            self._kept.clear()
            self._size_bytes = 0

    def _open(self) -> tuple[Preprocessor, _Graph]:
        if self._is_closed:
            raise RequestError("the deployment is closed: open it again")
        if self._opened is None:
            base = self._manifest.base
            vision = base.vision
            assert vision is not None
            verify_once(self._path, self._manifest, vision.files)
            steps = read_preprocessor(
                read_verified(self._path, self._manifest, vision.preprocessor), vision.preprocessor
            )
            _check_tiles(steps, vision)
            kind = OnnxVisionGraph if vision.patches is None else OnnxPatchGraph
            graph: _Graph = kind(locate(self._path, vision.graph), vision, base.hidden_size, self._threads)
            self._opened = steps, graph
        return self._opened

    def _keep(self, digest: str, embeds: Array) -> None:
        """Keep embeddings within the budget; the least recently used go first."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return
        if embeds.nbytes > self._cache_bytes:
            return
        self._kept[digest] = embeds
        self._size_bytes += embeds.nbytes
        while self._size_bytes > self._cache_bytes:
            self._size_bytes -= self._kept.popitem(last=False)[1].nbytes


def _encode(graph: _Graph, images: Sequence[Prepared]) -> list[Array]:
    """Embeddings of each image, ``(positions, d)``."""
    if isinstance(graph, OnnxPatchGraph):
        return [graph.run(image.pixel_values, image.grid) for image in images]
    tiles = np.concatenate([image.pixel_values for image in images])
    count = max(1, _PIXELS_AT_ONCE // (tiles.shape[2] * tiles.shape[3]))
    given = np.concatenate([graph.run(tiles[start : start + count]) for start in range(0, len(tiles), count)])
    ends = np.cumsum([len(image.pixel_values) for image in images])[:-1]
    # Copies, so that one that is kept does not keep its neighbours.
    return [own.reshape(-1, own.shape[-1]).copy() for own in np.split(given, ends)]


def _check_tiles(steps: Preprocessor, vision: Vision) -> None:
    """Check that pictures are cut as the manifest says, which has tokens for that; raises ``IntegrityError``."""
    pieces = None if vision.patches is None else (vision.image_size, vision.patches.merge)
    cut = steps.patching
    if pieces != (None if cut is None else ((cut.edge * cut.merge,) * 2, cut.merge)):
        raise IntegrityError(
            f"{vision.preprocessor} cuts pictures into patches by {cut}, the manifest expects {pieces} (the size of "
            "pieces, patches on an edge): export the base again"
        )
    expected = None if vision.tiles is None else (vision.image_size, len(vision.tiles.before_tile))
    given = None if steps.tiling is None else ((steps.tiling.edge, steps.tiling.edge), steps.tiling.most)
    if given != expected:
        raise IntegrityError(
            f"{vision.preprocessor} cuts pictures into tiles of {given}, the manifest has tokens for {expected} (their "
            "size, most in a row): export the base again"
        )
