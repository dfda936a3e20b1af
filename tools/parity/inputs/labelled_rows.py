"""Rows with labels beside their tokens: pairs of texts for an encoder, and positions of several modalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.manifest import Base
from adalink.tools.parity.inputs.prompts import fit
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.position_labels import PositionLabels
from adalink.tools.parity.report import Report, at_most


@dataclass(frozen=True)
class LabelledRows:
    """Rows that are compared beside the plain ones.

    Attributes:
        name: what they are, in the names of checks.
        rows: token ids of each row.
        labels: labels of each row.
    """

    name: str
    rows: list[list[int]]
    labels: list[PositionLabels]

    @property
    def is_text(self) -> bool:
        """Whether every position is text."""
        return all(labels.modality is None for labels in self.labels)


def collect_labelled_rows(
    report: Report,
    deployment: Deployment,
    reference: Reference,
    prompts: list[str] | None,
    rows: list[list[int]],
    longest: int,
) -> list[LabelledRows]:
    """Pairs of texts for an encoder, and rows of several modalities for a base that takes embeddings of others.

    Args:
        report: gets the check of pairs.
        deployment: the deployment to verify.
        reference: the base model in PyTorch.
        prompts: texts; ``None`` without a tokenizer.
        rows: token ids of single texts.
        longest: most tokens of a row.
    """
    collected = [_collect_pairs(report, deployment, reference, prompts, rows, longest)]
    base = deployment.manifest.base
    if len(base.modalities) > 1 and base.vision is None:
        collected.append(_mixed_modalities(base, rows))
    return [labelled for labelled in collected if labelled is not None]


def _mixed_modalities(base: Base, rows: list[list[int]]) -> LabelledRows:
    """The rows with a seeded modality, or none, at each position, the first of another modality than text."""
    rng = np.random.default_rng([20231012, len(base.modalities)])
    maps = [rng.integers(-1, len(base.modalities), len(row)).tolist() for row in rows]
    others = len(base.modalities) - 1
    labels = [PositionLabels(modality=[1 + index % others, *row[1:]]) for index, row in enumerate(maps)]
    return LabelledRows("modalities", rows, labels)


def _collect_pairs(
    report: Report,
    deployment: Deployment,
    reference: Reference,
    prompts: list[str] | None,
    rows: list[list[int]],
    longest: int,
) -> LabelledRows | None:
    """Rows of several segments, and the check of how the deployment makes them from texts.

    Where the tokenizer gives no types, the rows have seeded ones. ``None`` for a base that tells no segments apart.
    """
    base = deployment.manifest.base
    if base.kind != "encoder":
        return None
    if base.token_types is None:
        report.skipped.append("pairs of texts: the deployment was written by a kit without token types")
        return None
    encoded = [] if prompts is None else _encode_pairs(report, deployment, reference, prompts, longest)
    if not base.takes_token_types:
        return None
    seeded = _seeded_types(base, rows)
    pairs = [*encoded, seeded[0]] if encoded and base.tokenizer_types else seeded
    return LabelledRows("pairs", [ids for ids, _ in pairs], [PositionLabels(types) for _, types in pairs])


def _encode_pairs(
    report: Report, deployment: Deployment, reference: Reference, prompts: list[str], longest: int
) -> list[tuple[list[int], list[int]]]:
    """Ids and types of each prompt with the one before it, compared with the model's own tokenizer."""
    theirs, ours = reference.tokenizer, deployment.tokenizer.encode_pair
    pairs, differing = [], []
    for index, text in enumerate(prompts):
        first, second = _fitting_pair(text, prompts[index - 1], ours, longest)
        if not (first and second):
            continue
        made = theirs(first, second)
        ids = list(made["input_ids"])
        types = list(made.get("token_type_ids", [0] * len(ids)))
        if ours(first, second) != (ids, types):
            differing.append(index)
        pairs.append((ids, types))
    detail = f"of {len(pairs)} pairs of texts, ids and token types; differing: {differing or 'none'}"
    report.checks.append(at_most("base/pair-tokens", len(differing), 0, detail))
    return pairs


def _fitting_pair(
    text: str, text_pair: str, encode: Callable[..., tuple[list[int], list[int]]], longest: int
) -> tuple[str, str]:
    """The texts, cut to ``longest`` tokens together; empty where no letter fits."""
    first = fit(text, lambda start: encode(start)[0], longest // 2)
    return first, fit(text_pair, lambda start: encode(first, start)[0], longest)


def _seeded_types(base: Base, rows: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """The rows with random types, the last token's never 0."""
    assert base.token_types is not None
    rng = np.random.default_rng([20231012, base.token_types])
    types = [rng.integers(0, base.token_types, len(row)).tolist() for row in rows]
    return [(row, [*kinds[:-1], base.token_types - 1]) for row, kinds in zip(rows, types, strict=True)]
