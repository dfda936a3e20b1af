"""Heads that are not trained: the label whose text the base embeds nearest, by the cosine (``--head none``).

The row of a label is the base's embedding of its text, with length 1, times one number for all labels. So the label
with the highest score is the one with the highest cosine, and deployment needs nothing new. That number makes a score
20 times the cosine for a training text of mean length, as in the studies. Only the bottleneck learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from adalink.runtime.errors import ConfigError, ModelError
from adalink.runtime.storage.head_spec import SINGLE_LABEL, Head
from adalink.training.data.labelled_rows import LabelledRow
from adalink.training.heads.classifier import LabelCollator, LabelledExample, encode_labelled, features
from adalink.training.loop.trainer import batches

if TYPE_CHECKING:
    from adalink.training.method.attach import AdaLinkModel

_SCALE = 20.0
_BATCH_ROWS = 16


def check_label_texts(kind: str, *, has_adapter: bool) -> None:
    """Check that label texts suit a task; raises ``ConfigError``.

    Args:
        kind: its problem type.
        has_adapter: whether there is a bottleneck or a soft prompt to train.
    """
    if kind != SINGLE_LABEL:
        raise ConfigError(f"head is 'none' for {kind}, expected {SINGLE_LABEL}: only one label is the nearest")
    if not has_adapter:
        raise ConfigError("head is 'none' without a bottleneck and a soft prompt, which leaves nothing to train")


@torch.no_grad()
def label_vectors(
    model: Any, tokenizer: Any, head: Head, examples: Sequence[LabelledExample], collate: LabelCollator
) -> torch.Tensor:
    """Weight of the head, float32 with shape ``(labels, d)``.

    Args:
        model: the base, without an adapter.
        tokenizer: its tokenizer.
        head: the labels and the pooling.
        examples: the training rows.
        collate: makes batches of them.

    Raises:
        ModelError: the base embeds two labels alike.
    """
    rows = [LabelledRow(text=label, labels=(label,), line=0) for label in head.labels]
    vectors = functional.normalize(_embed(model, encode_labelled(rows, tokenizer, head), collate, head))
    alike = (vectors @ vectors.T).fill_diagonal_(-1.0) > 1 - 1e-6
    if bool(alike.any()):
        one, other = (head.labels[int(place)] for place in alike.nonzero()[0])
        raise ModelError(f"the base embeds labels {one!r} and {other!r} alike: give them other names, or train a head")
    length = _embed(model, examples, collate, head).norm(dim=1).mean()
    scaled: torch.Tensor = vectors * (_SCALE / length)
    return scaled


def place(attached: AdaLinkModel, vectors: torch.Tensor) -> None:
    """Give the head these weights, for good; its bias stays 0."""
    assert attached.head is not None
    with torch.no_grad():
        attached.head.weight.copy_(vectors)
    attached.head.requires_grad_(False)


def _embed(model: Any, examples: Sequence[LabelledExample], collate: LabelCollator, head: Head) -> torch.Tensor:
    """Pooled states of each text, ``(texts, d)``."""
    parts = []
    for batch in batches(examples, collate, _BATCH_ROWS, model.device):
        del batch["labels"]
        parts.append(features(model, head, **batch))
    return torch.cat(parts)
