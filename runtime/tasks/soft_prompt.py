"""Soft prompts: trained embeddings prepended to each sequence.

They occupy positions in the model, but callers never see them: they are inserted before the forward pass and stripped
from the output. The bottleneck does not apply to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, Adapter
from adalink.runtime.storage.digest import cache_key
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.safetensors import as_stored


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """The soft prompt of one task.

    Attributes:
        digest: the adapter's.
        vectors: shape ``(n, d)`` in the base's dtype; bfloat16 as its bits.
    """

    digest: str
    vectors: Array

    def cache_keys(self) -> Array:
        """Prefix cache key of each position, int64 with shape ``(n,)``; differs from all token ids."""
        return np.full(len(self.vectors), cache_key(f"{self.digest} {SOFT_PROMPT_NAME}"))


class SoftPromptLayout:
    """Positions of a batch after its soft prompts are prepended.

    With padding on the left, a soft prompt directly precedes its row's first token, and rows end together. With padding
    on the right, it takes the first columns, and rows begin together: encoders number positions from the left. The
    batch is as wide as its longest row.

    Attributes:
        mask: 1 for tokens and soft prompts, int64 with shape ``(batch, total)``.
        text_mask: the caller's mask, 1 for tokens alone, shape ``(batch, seq)``.
    """

    def __init__(self, mask: Array, prompts: Sequence[SoftPrompt | None], padding_side: str) -> None:
        """Lay out a batch.

        Args:
            mask: 1 for tokens and 0 for padding, shape ``(batch, seq)``; every row has a 1.
            prompts: soft prompt of each row; empty if no row has one.
            padding_side: the engine's, ``"left"`` or ``"right"``.
        """
        self.mask = self.text_mask = mask
        self._prompts = list(prompts)
        if not self._prompts:
            return
        batch, seq = mask.shape
        lengths = np.array([0 if prompt is None else len(prompt.vectors) for prompt in prompts])
        ends = seq - mask[:, ::-1].argmax(axis=1)
        first = mask.argmax(axis=1)
        total = max(seq, int((lengths + ends - first).max()))
        offsets = lengths - first if padding_side == "right" else total - ends
        self._starts = offsets + first - lengths
        columns = offsets[:, None] + np.arange(seq)
        # Positions outside were padding.
        self._is_inside = (columns >= 0) & (columns < total)
        self._columns = np.clip(columns, 0, total - 1)
        self.mask = np.zeros((batch, total), np.int64)
        self.mask[self._token_index] = mask[self._is_inside]
        for row, where, _ in self._prompt_slices():
            self.mask[row, where] = 1

    @property
    def is_empty(self) -> bool:
        """Whether no row has a soft prompt; nothing is moved then."""
        return not self._prompts

    def prepend(self, embeds: Array, modality: Array | None) -> tuple[Array, Array]:
        """Prepend the soft prompts.

        Args:
            embeds: embeddings before the bottleneck, shape ``(batch, seq, d)`` in the base's dtype.
            modality: index in the base's modalities for each position, ``(batch, seq)``; ``None`` means text.

        Returns:
            Embeddings with shape ``(batch, total, d)`` and modality with shape ``(batch, total)``; the modality of soft
            prompts and padding is -1, none.
        """
        wide = np.zeros((*self.mask.shape, embeds.shape[2]), embeds.dtype)
        indices = np.full(self.mask.shape, -1, np.int64)
        wide[self._token_index] = embeds[self._is_inside]
        indices[self._token_index] = 0 if modality is None else modality[self._is_inside]
        for row, where, prompt in self._prompt_slices():
            wide[row, where] = prompt.vectors
            indices[row, where] = -1
        return wide, indices

    def place(self, values: Array) -> Array:
        """Values of the caller's positions, ``(batch, seq)``, in the wider batch ``(batch, total)``; 0 elsewhere."""
        if self.is_empty:
            return values
        wide = np.zeros(self.mask.shape, values.dtype)
        wide[self._token_index] = values[self._is_inside]
        return wide

    def strip(self, output: Array) -> Array:
        """An engine's output, ``(batch, total, width)``, at the caller's positions: ``(batch, seq, width)``."""
        return output if self.is_empty else np.take_along_axis(output, self._columns[..., None], axis=1)

    def cache_keys(self, row: int) -> Array:
        """Prefix cache keys of a row's soft prompt; empty without one."""
        prompt = None if self.is_empty else self._prompts[row]
        return np.zeros(0, np.int64) if prompt is None else prompt.cache_keys()

    @property
    def _token_index(self) -> tuple[Array, Array]:
        """Row and column of each of the caller's positions in the wider batch; padding beyond it is left out."""
        rows = np.nonzero(self._is_inside)[0]
        return rows, self._columns[self._is_inside]

    def _prompt_slices(self) -> list[tuple[int, slice, SoftPrompt]]:
        """Rows with a soft prompt, its columns, and the soft prompt."""
        return [
            (row, slice(int(start), int(start) + len(prompt.vectors)), prompt)
            for row, (start, prompt) in enumerate(zip(self._starts, self._prompts, strict=True))
            if prompt is not None
        ]


def soft_prompts_of(adapter: Adapter, base: Base) -> list[SoftPrompt]:
    """The soft prompt of an adapter in the base's dtype: a list of one or none."""
    vectors = adapter.weights.get(SOFT_PROMPT_NAME)
    return [] if vectors is None else [SoftPrompt(adapter.digest, as_stored(vectors, base.embedding_dtype))]
