"""Labels of a row's positions beside its tokens: token types and modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PositionLabels:
    """Labels of one row, each a number for every token.

    Attributes:
        token_types: token types of an encoder's row; ``None`` if all are 0.
        modality: index in the base's modalities, -1 for none; ``None`` if all is text.
    """

    token_types: list[int] | None = None
    modality: list[int] | None = None

    def arguments(self) -> dict[str, list[list[int]]]:
        """Arguments of ``Deployment.run`` for the row alone."""
        labels = {"token_type_ids": self.token_types, "modality": self.modality}
        return {name: [values] for name, values in labels.items() if values is not None}

    def is_text(self, length: int) -> list[bool]:
        """For each token whether it is text."""
        return [True] * length if self.modality is None else [index == 0 for index in self.modality]


NO_LABELS = PositionLabels()


def position_maps(
    modalities: Sequence[str], base: Base, length: int, prompt_length: int | None, labels: PositionLabels
) -> dict[str, torch.Tensor]:
    """Arguments of ``AdaLinkModel.positions`` for one row.

    Args:
        modalities: those of the adapter, whose indices the map holds.
        base: the contract; a base with a vision tower knows its images by their token.
        length: tokens of the row.
        prompt_length: length of its prompt; ``None`` for all of it.
        labels: labels of the row.
    """
    import torch

    maps: dict[str, torch.Tensor] = {}
    if prompt_length is not None:
        maps["prompt_mask"] = (torch.arange(length) < prompt_length)[None]
    if base.vision is None and len(base.modalities) > 1:
        index_of = [modalities.index(name) if name in modalities else -1 for name in base.modalities]
        row = [-1 if index < 0 else index_of[index] for index in labels.modality or [0] * length]
        maps["modality"] = torch.tensor([row])
    return maps
