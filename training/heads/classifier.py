"""Heads in PyTorch: pooling, scores and losses of an encoder with an adapter and a head, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from adalink.runtime.storage.head_spec import MULTI_LABEL, OUTSIDE, REGRESSION, SINGLE_LABEL, TOKENS, Head
from adalink.training.data.batches import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adalink.training.data.labelled_rows import LabelledRow
    from adalink.training.method.attach import AdaLinkModel


@dataclass(frozen=True)
class LabelledExample:
    """Token ids of a row and its target.

    Attributes:
        ids: token ids, special tokens included.
        types: token type of each; empty for a model without.
        target: index of the label; or 0 and 1 for each label; or the number; or the index of each token's tag, -100 for
            those that have none.
        offsets: of each token the first character and the one behind the last.
        words: number of each token's word; ``None`` for special tokens.
        is_cut: whether the text was longer.
    """

    ids: list[int]
    types: list[int]
    target: int | float | list[float] | list[int]
    offsets: list[tuple[int, int]]
    words: list[int | None]
    is_cut: bool


def encode_labelled(
    rows: Sequence[LabelledRow], tokenizer: PreTrainedTokenizerBase, head: Head
) -> list[LabelledExample]:
    """Token ids and targets of rows, cut to ``head.max_tokens`` as the runtime cuts them."""
    tokenizer.truncation_side = "right"
    index = {label: number for number, label in enumerate(head.labels)}
    examples = []
    for row in rows:
        whole = len(tokenizer(row.text, row.text_pair)["input_ids"])
        encoded = tokenizer(
            row.text, row.text_pair, truncation=True, max_length=head.max_tokens, return_offsets_mapping=True
        )
        offsets, words = list(map(tuple, encoded["offset_mapping"])), encoded.word_ids()
        target = _target(row, head, index, offsets, words)
        types = list(encoded.get("token_type_ids", []))
        ids = list(encoded["input_ids"])
        examples.append(LabelledExample(ids, types, target, offsets, words, len(ids) < whole))
    return examples


def _target(
    row: LabelledRow,
    head: Head,
    index: dict[str, int],
    offsets: Sequence[tuple[int, int]],
    words: Sequence[int | None],
) -> int | float | list[float] | list[int]:
    if head.problem_type == SINGLE_LABEL:
        return index[row.labels[0]]
    if head.problem_type == MULTI_LABEL:
        return [float(label in row.labels) for label in head.labels]
    if head.problem_type == REGRESSION:
        return row.value
    targets = [IGNORED_LABEL] * len(offsets)
    seen: set[tuple[int, int]] = set()
    for position, ((start, end), word) in enumerate(zip(offsets, words, strict=True)):
        start += len(row.text[start:end]) - len(row.text[start:end].lstrip())
        if word is None or start >= end:  # special tokens, and white space that is a token of its own
            continue
        span = next((span for span in row.spans if span.start < end and start < span.end), None)
        if span is None:
            targets[position] = index[OUTSIDE]
            continue
        key = (span.start, span.end)
        targets[position] = index[f"{'I' if key in seen else 'B'}-{span.label}"]
        seen.add(key)
    return targets


class LabelCollator:
    """Batches of examples, padded on the right."""

    def __init__(self, head: Head, pad: int) -> None:
        self._head, self._pad = head, pad

    def __call__(self, examples: Sequence[LabelledExample]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask``, perhaps ``token_type_ids``, ``(batch, seq)``, and ``labels``."""
        length = max(len(example.ids) for example in examples)

        def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        batch = {
            "input_ids": padded([example.ids for example in examples], self._pad),
            "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        }
        if examples[0].types:
            batch["token_type_ids"] = padded([example.types for example in examples], 0)
        targets: list[Any] = [example.target for example in examples]
        is_tokens = self._head.problem_type == TOKENS
        batch["labels"] = padded(targets, IGNORED_LABEL) if is_tokens else torch.tensor(targets)
        return batch


class TrainableClassifier(nn.Module):
    """Adapters and head as a module; its forward pass computes the loss of the frozen base behind them."""

    def __init__(self, attached: AdaLinkModel) -> None:
        super().__init__()
        assert attached.head is not None
        assert attached.config.head is not None
        self.adapters, self.head = attached.adapters, attached.head
        self.attached, self.spec = attached, attached.config.head

    def scores(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Float32 scores, ``(batch, labels)``, or ``(batch, seq, labels)`` of tokens."""
        scores: torch.Tensor = self.head(features(self.attached.model, self.spec, input_ids, attention_mask, **inputs))
        return scores

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of a batch of ``LabelCollator``: its mean over rows, or over tokens with a tag."""
        losses = self._losses(labels, inputs)
        if self.spec.problem_type != TOKENS:
            return {"loss": losses.mean()}
        return {"loss": losses.sum() / (labels != IGNORED_LABEL).sum()}

    @torch.no_grad()
    def row_losses(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Loss of each row, of tokens the mean; float32 with shape ``(batch,)``; arguments as ``forward``'s."""
        losses = self._losses(labels, inputs)
        return losses if losses.ndim == 1 else losses.sum(dim=1) / (labels != IGNORED_LABEL).sum(dim=1).clamp(min=1)

    def _losses(self, labels: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Losses with shape ``(batch,)``, or ``(batch, seq)`` of tokens, 0 for those without a tag."""
        scores, kind = self.scores(**inputs), self.spec.problem_type
        if kind == REGRESSION:
            return functional.mse_loss(scores[:, 0], labels.float(), reduction="none")
        if kind == MULTI_LABEL:
            return functional.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(dim=1)
        losses = functional.cross_entropy(
            scores.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        return losses.view(labels.shape)


def features(
    model: Any, head: Head, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    """What a head takes, float32: pooled states, ``(batch, d)``, or those of each token, ``(batch, seq, d)``."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    states = encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state.float()
    return states if head.problem_type == TOKENS else pool_states(states, attention_mask, head.pooling)


def pool_states(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector of each row's states, shape ``(batch, d)``, for a batch that is padded on the right.

    Args:
        states: shape ``(batch, seq, d)``.
        mask: 1 for tokens, shape ``(batch, seq)``.
        mode: one of ``adalink.runtime.storage.pooling_schema.POOLING_MODES``.
    """
    lengths = mask.sum(dim=1)
    if mode == "cls":
        return states[:, 0]
    if mode == "lasttoken":
        return states[torch.arange(len(states)), lengths - 1]
    if mode == "max":
        return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)
    weights = mask.to(states.dtype)
    if mode == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    totals = weights.sum(dim=1, keepdim=True)
    divisor = totals.sqrt() if mode == "mean_sqrt_len_tokens" else totals
    return (states * (weights / divisor)[..., None]).sum(dim=1)
