"""Batch inputs: token ids or embeddings, and the task of each row, on their way to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adalink.runtime.arrays import Array
from adalink.runtime.tasks.adapter_mapping import AdapterMapping
from adalink.runtime.vision.placeholders import ImageEmbeds


@dataclass(frozen=True, eq=False)
class BatchInputs:
    """A checked batch before its adapters.

    Attributes:
        ids: token ids, int64 with shape ``(batch, seq)``, with a placeholder for every position of an image; or else
        embeds: embeddings with shape ``(batch, seq, d)``.
        modality: index in the base's modalities for each position, ``(batch, seq)``; ``None`` for text, or for what
            follows from the images.
        tasks: the task of each row.
        images: embeddings of the images of each row; ``None`` if the batch has none.
        types: token type of each position, int64 with shape ``(batch, seq)``, of a whole batch; ``None`` if all are 0.
    """

    ids: Array | None
    embeds: Array | None
    modality: Array | None
    tasks: AdapterMapping
    images: Sequence[Sequence[ImageEmbeds]] | None = None
    types: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, seq)``."""
        source = self.embeds if self.ids is None else self.ids
        assert source is not None
        return source.shape[0], source.shape[1]

    def rows(self, start: int, stop: int) -> BatchInputs:
        """Rows ``start`` to ``stop`` with their tasks; image embeddings must be merged already."""
        if (start, stop) == (0, self.shape[0]):
            return self
        return BatchInputs(*self._select(slice(start, stop)), tasks=self.tasks.take(range(start, stop)))

    def columns(self, start: int, stop: int) -> BatchInputs:
        """Positions ``start`` to ``stop`` of every row; image embeddings must be merged already."""
        return BatchInputs(*self._select((slice(None), slice(start, stop))), tasks=self.tasks)

    def _select(self, index: Any) -> tuple[Array | None, Array | None, Array | None]:
        def select(array: Array | None) -> Array | None:
            return None if array is None else array[index]

        return select(self.ids), select(self.embeds), select(self.modality)
