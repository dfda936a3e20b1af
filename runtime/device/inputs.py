"""What a device's engine is given: token ids or embeddings, and the task of each row, with nothing computed yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adalink.runtime.arrays import Array
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch before its tasks.

    Attributes:
        ids: token ids, int64 with shape ``(batch, seq)``; or else
        embeds: embeddings with shape ``(batch, seq, d)``.
        modality: index in the base's modalities for each position, ``(batch, seq)``; ``None`` means text.
        tasks: the task of each row.
    """

    ids: Array | None
    embeds: Array | None
    modality: Array | None
    tasks: AdapterMapping

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, seq)``."""
        source = self.embeds if self.ids is None else self.ids
        assert source is not None
        return source.shape[0], source.shape[1]

    def rows(self, start: int, stop: int) -> Inputs:
        """Some rows of the batch, with their tasks."""
        if (start, stop) == (0, self.shape[0]):
            return self
        own = slice(start, stop)
        return Inputs(*self._select(own), tasks=self.tasks.take(range(start, stop)))

    def columns(self, start: int, stop: int) -> Inputs:
        """Some positions of every row."""
        return Inputs(*self._select((slice(None), slice(start, stop))), tasks=self.tasks)

    def _select(self, index: Any) -> tuple[Array | None, Array | None, Array | None]:
        def taken(array: Array | None) -> Array | None:
            return None if array is None else array[index]

        return taken(self.ids), taken(self.embeds), taken(self.modality)
