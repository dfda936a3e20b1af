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
from adalink.runtime.errors import RequestError
from adalink.runtime.integrity import locate, read_verified
from adalink.runtime.manifest import Manifest
from adalink.runtime.onnxruntime_vision import OnnxVisionGraph
from adalink.runtime.pictures import Picture, read_picture
from adalink.runtime.placeholders import ImageEmbeds
from adalink.runtime.preprocess import Preprocessor, read_preprocessor
from adalink.runtime.verified import verify_once

# The tower's own working memory grows with the images of a call.
_IMAGES_AT_ONCE = 8


class OpenVision:
    """The image side of a deployment; safe for calls from several threads, which it serves one after another."""

    def __init__(self, path: Path, manifest: Manifest, threads: int | None, cache_bytes: int) -> None:
        self._path, self._manifest, self._threads = path, manifest, threads
        self._cache_bytes = cache_bytes
        self._size_bytes = 0
        self._kept: OrderedDict[str, Array] = OrderedDict()
        self._opened: tuple[Preprocessor, OnnxVisionGraph] | None = None
        self._is_closed = False
        self._lock = threading.Lock()
        self.encoded = 0

    def embed(self, images: Sequence[Sequence[Picture]]) -> list[list[ImageEmbeds]]:
        """Embeddings of the images of each row.

        Args:
            images: those of each row; only for a base with a vision tower.

        Raises:
            RequestError: one is no picture.
            IntegrityError: a file of the vision tower is not the one in the manifest.
            BackendError: ONNX Runtime is not there, or refused.
        """
        with self._lock:
            preprocessor, graph = self._open()
            prepared: dict[str, Array] = {}
            digests: list[list[str]] = []
            for row, own in enumerate(images):
                digests.append([])
                for place, source in enumerate(own):
                    values = preprocessor.apply(read_picture(source, f"images[{row}][{place}]"))
                    digests[-1].append(digest_bytes(values.data))
                    prepared[digests[-1][-1]] = values
            found = {digest: self._kept[digest] for digest in prepared if digest in self._kept}
            missing = [digest for digest in prepared if digest not in found]
            for start in range(0, len(missing), _IMAGES_AT_ONCE):
                chosen = missing[start : start + _IMAGES_AT_ONCE]
                given = graph.run(np.stack([prepared[digest] for digest in chosen]))
                self.encoded += len(chosen)
                # Copies, so that one that is kept does not keep its neighbours.
                found.update((digest, embeds.copy()) for digest, embeds in zip(chosen, given, strict=True))
            for digest in found:
                self._keep(digest, found[digest])
            return [[ImageEmbeds(digest, found[digest]) for digest in own] for own in digests]

    def close(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._is_closed = True
            self._opened = None
            self._kept.clear()
            self._size_bytes = 0

    def _open(self) -> tuple[Preprocessor, OnnxVisionGraph]:
        if self._is_closed:
            raise RequestError("the deployment is closed: open it again")
        if self._opened is None:
            base = self._manifest.base
            vision = base.vision
            assert vision is not None
            verify_once(self._path, self._manifest, vision.files)
            steps = read_verified(self._path, self._manifest, vision.preprocessor)
            graph = OnnxVisionGraph(locate(self._path, vision.graph), vision, base.hidden_size, self._threads)
            self._opened = read_preprocessor(steps, vision.preprocessor), graph
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
