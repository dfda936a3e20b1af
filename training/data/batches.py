"""Batches of training rows: token ids of several rows, padded to one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adalink.training.data.rows import Example

IGNORED_LABEL = -100


def pad_decoder(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch for a decoder, padded on the left so that all rows end in the last column.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` (int64) and ``labels`` (int64, -100 but on targets), each
        with shape ``(batch, seq)``.
    """
    length = max(len(example.prompt) + len(example.target) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        blank = length - len(example.prompt) - len(example.target)
        ids.append([pad] * blank + example.prompt + example.target)
        mask.append([0] * blank + [1] * (length - blank))
        labels.append([IGNORED_LABEL] * (blank + len(example.prompt)) + example.target)
    attention_mask = torch.tensor(mask)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        "labels": torch.tensor(labels),
    }


def pad_encoder_decoder(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """A batch for an encoder-decoder, padded on the right: prompts for the encoder, targets as labels.

    Returns:
        ``input_ids`` and ``attention_mask`` with shape ``(batch, prompt)``, ``labels`` with shape ``(batch, target)``.
    """
    source = max(len(example.prompt) for example in examples)
    target = max(len(example.target) for example in examples)
    return {
        "input_ids": torch.tensor([e.prompt + [pad] * (source - len(e.prompt)) for e in examples]),
        "attention_mask": torch.tensor([[1] * len(e.prompt) + [0] * (source - len(e.prompt)) for e in examples]),
        "labels": torch.tensor([e.target + [IGNORED_LABEL] * (target - len(e.target)) for e in examples]),
    }
