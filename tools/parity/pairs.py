"""Pairs of texts for an encoder: their tokens and token types, by the model's tokenizer and by the deployment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.manifest import Base
from adalink.tools.parity.prompts import fit
from adalink.tools.parity.report import Report, at_most


@dataclass(frozen=True)
class Pairs:
    """Rows of several segments.

    Attributes:
        rows: token ids of each row.
        types: token types of each row, at least one of them other than 0.
    """

    rows: list[list[int]]
    types: list[list[int]]


def collect_pairs(
    report: Report,
    deployment: Deployment,
    against: str,
    prompts: list[str] | None,
    rows: list[list[int]],
    longest: int,
) -> Pairs | None:
    """Rows of several segments, and the check of how the deployment makes them from texts.

    Where the tokenizer gives no types, the rows have seeded ones.

    Args:
        report: gets the check.
        deployment: the deployment to verify.
        against: the base model.
        prompts: texts; ``None`` without a tokenizer.
        rows: token ids of single texts.
        longest: most tokens of a row.

    Returns:
        The rows; ``None`` for a base that tells no segments apart.
    """
    base = deployment.manifest.base
    if base.kind != "encoder":
        return None
    if base.token_types is None:
        report.skipped.append("pairs of texts: the deployment was written by a kit without token types")
        return None
    encoded = None if prompts is None else _encode_pairs(report, deployment, against, prompts, longest)
    if not base.takes_token_types:
        return None
    seeded = _seeded_types(base, rows)
    if encoded is None or not base.tokenizer_types:
        return seeded
    return Pairs(encoded.rows + seeded.rows[:1], encoded.types + seeded.types[:1])


def _encode_pairs(
    report: Report, deployment: Deployment, against: str, prompts: list[str], longest: int
) -> Pairs | None:
    """Each prompt with the next one, compared with the model's own tokenizer; ``None`` if none fits."""
    from adalink.training.models.loading import load_tokenizer

    theirs, ours = load_tokenizer(against), deployment.tokenizer.encode_pair
    pairs = Pairs([], [])
    differing = []
    for index, text in enumerate(prompts):
        first = fit(text, lambda text: ours(text)[0], longest // 2)
        second = fit(prompts[index - 1], lambda text, first=first: ours(first, text)[0], longest)
        if not (first and second):
            continue
        ids, types = ours(first, second)
        made = theirs(first, second)
        expected = list(made["input_ids"]), list(made.get("token_type_ids", [0] * len(made["input_ids"])))
        if (ids, types) != expected:
            differing.append(index)
        pairs.rows.append(expected[0])
        pairs.types.append(expected[1])
    detail = f"of {len(pairs.rows)} pairs of texts, ids and token types; differing: {differing or 'none'}"
    report.checks.append(at_most("base/pair-tokens", len(differing), 0, detail))
    return pairs if pairs.rows else None


def _seeded_types(base: Base, rows: list[list[int]]) -> Pairs:
    """The rows with random types, the last token's never 0."""
    assert base.token_types is not None
    rng = np.random.default_rng([20231012, base.token_types])
    types = [rng.integers(0, base.token_types, len(row)).tolist() for row in rows]
    return Pairs(rows, [[*row[:-1], base.token_types - 1] for row in types])
