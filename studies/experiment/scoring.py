"""Label scoring: which label an adapted base gives a text. One rule for all methods; nothing is generated.

A decoder gives the label whose text is the most likely after the prompt: the sum of the log-probabilities of its
tokens. No label's tokens begin another's, so no end token is scored. An encoder gives the label whose text it embeds
nearest to the row's, by the cosine. Label texts are embedded once, by the base model.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from adalink.runtime.errors import DataError
from adalink.training.data.batches import IGNORED_LABEL, pad_decoder
from adalink.training.data.rows import Example
from adalink.training.models.loading import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from studies.experiment.data import DataSet, Labelled
    from studies.experiment.methods import Tuned

_COSINE_SCALE = 20.0
_BRANCHES = 64  # rows times labels that a decoder goes on with at once


class Task(ABC, nn.Module):
    """A tuned base asked about one data set; what the Trainer trains."""

    def __init__(self, tuned: Tuned) -> None:
        super().__init__()
        self.tuned = tuned

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        device: torch.device = self.tuned.base.device
        return device

    @abstractmethod
    def collate(self, rows: Sequence[Labelled]) -> dict[str, torch.Tensor]:
        """The keyword arguments of ``forward`` for a batch of rows."""

    @abstractmethod
    def scores(self, rows: Sequence[Labelled]) -> torch.Tensor:
        """Score of each label, float32 with shape ``(rows, labels)``: the highest is the answer.

        The rows are of one part of the data set; labels of other parts get ``-inf``.
        """


def make_task(
    tuned: Tuned, tokenizer: PreTrainedTokenizerBase, data: DataSet, label_vectors: torch.Tensor | None
) -> Task:
    """The task of a data set for a decoder, or, given ``label_vectors``, for an encoder."""
    if label_vectors is None:
        return TextToText(tuned, tokenizer, data)
    return NearestLabel(tuned, tokenizer, label_vectors, data.part_of)


def check_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataSet, rows: Sequence[Labelled], soft: int
) -> None:
    """Refuse rows that are longer than the longest sequence the base was made for.

    Args:
        model: the base.
        tokenizer: its tokenizer.
        data: the data set.
        rows: those of its rows that are learned from or scored.
        soft: embeddings that a method puts before the text.

    Raises:
        DataError: a row, with the longest label that a decoder may go on with, has more tokens than there are
            positions.
    """
    limit = max_positions(model)
    if limit is None or not rows:
        return
    longest = [0] * (max(data.part_of) + 1)
    if model.can_generate():
        for part, label in zip(data.part_of, data.labels, strict=True):
            longest[part] = max(longest[part], len(_label_tokens(tokenizer, label)))
    texts = [data.prompt(row) if model.can_generate() else row.text for row in rows]
    for row, ids in zip(rows, tokenizer(texts)["input_ids"], strict=True):
        length = soft + len(ids) + longest[data.part_of[row.label]]
        if length > limit:
            raise DataError(
                f"data set {data.name}: {row.text[:60]!r} takes up to {length} positions, {soft} of them a soft "
                f"prompt's, and {type(model).__name__} has {limit}: lower words, or shorten the row"
            )


def _label_tokens(tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    """What a decoder goes on with to give a label."""
    return list(tokenizer(f" {label}", add_special_tokens=False)["input_ids"])


class TextToText(Task):
    """A decoder that goes on with the text of the label.

    Raises:
        DataError: the tokens of one label begin another's.
    """

    def __init__(self, tuned: Tuned, tokenizer: PreTrainedTokenizerBase, data: DataSet) -> None:
        super().__init__(tuned)
        self._data = data
        self._tokenizer = tokenizer
        self._labels = [_label_tokens(tokenizer, label) for label in data.labels]
        part_of = data.part_of
        for one, tokens in enumerate(self._labels):
            for other, longer in enumerate(self._labels):
                if one != other and part_of[one] == part_of[other] and longer[: len(tokens)] == tokens:
                    raise DataError(
                        f"data set {data.name}: the tokens of label {data.labels[one]!r} begin those of "
                        f"{data.labels[other]!r}, so their likelihoods cannot be compared; give one another text"
                    )

    def collate(self, rows: Sequence[Labelled]) -> dict[str, torch.Tensor]:
        """Ids, mask, positions and labels with shape ``(rows, seq)``, all rows ending in the last column."""
        return pad_decoder([Example(self._prompt(row), self._labels[row.label]) for row in rows], 0)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean loss over the labels' tokens of a batch that ``collate`` made."""
        # The head is needed only from the token before the first target on.
        kept = int((labels != IGNORED_LABEL).any(dim=0).sum())
        logits = self._run(input_ids, attention_mask, kept + 1, use_cache=False).logits
        loss = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, -kept:].flatten(), ignore_index=IGNORED_LABEL
        )
        return {"loss": loss}

    @torch.inference_mode()
    def scores(self, rows: Sequence[Labelled]) -> torch.Tensor:
        """Log-likelihood of each label's text, ``(rows, labels)``; a prompt is computed once for all labels."""
        batch = pad_decoder([Example(self._prompt(row), []) for row in rows], 0)
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        part_of = self._data.part_of
        rivals = [index for index, part in enumerate(part_of) if part == part_of[rows[0].label]]
        longer = [index for index in rivals if len(self._labels[index]) > 1]
        output = self._run(ids, mask, 1, use_cache=bool(longer))
        first = output.logits[:, -1].float().log_softmax(dim=-1)
        result: torch.Tensor = first.new_full((len(rows), len(self._labels)), float("-inf"))
        result[:, rivals] = first[:, [self._labels[index][0] for index in rivals]]
        if longer:
            mask = torch.cat([mask.new_ones(len(rows), self.tuned.soft_tokens), mask], dim=1)
            step = max(1, _BRANCHES // len(rows))
            for start in range(0, len(longer), step):
                chosen = longer[start : start + step]
                result[:, chosen] += self._rest(output.past_key_values, mask, [self._labels[index] for index in chosen])
        return result

    def _rest(self, cache: Any, mask: torch.Tensor, labels: list[list[int]]) -> torch.Tensor:
        """Log-likelihood of what follows the first token of each label, ``(rows, labels)``."""
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(labels))
        count, length = len(mask), max(map(len, labels)) - 1
        device = mask.device
        ids = torch.tensor([tokens[:-1] + [0] * (length + 1 - len(tokens)) for tokens in labels], device=device)
        targets = torch.tensor([tokens[1:] + [0] * (length + 1 - len(tokens)) for tokens in labels], device=device)
        real = torch.tensor([[place < len(tokens) - 1 for place in range(length)] for tokens in labels], device=device)
        # Padding is on the right here, where causal attention keeps it from what is scored.
        mask = torch.cat([mask.repeat_interleave(len(labels), 0), mask.new_ones(count * len(labels), length)], dim=1)
        output = self.tuned.base(
            inputs_embeds=self.tuned.base.get_input_embeddings()(ids.repeat(count, 1)),
            attention_mask=mask,
            position_ids=_positions(mask)[:, -length:],
            past_key_values=cache,
            use_cache=True,
        )
        log_probs = (
            output.logits.float().log_softmax(dim=-1).gather(2, targets.repeat(count, 1).unsqueeze(2)).squeeze(2)
        )
        total: torch.Tensor = (log_probs * real.repeat(count, 1)).sum(dim=1)
        return total.view(count, len(labels))

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, kept: int, *, use_cache: bool) -> Any:
        embeds, mask = self.tuned.embed(ids, mask)
        return self.tuned.base(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=_positions(mask),
            use_cache=use_cache,
            logits_to_keep=kept,
        )

    def _prompt(self, row: Labelled) -> list[int]:
        return list(self._tokenizer(self._data.prompt(row))["input_ids"])


class NearestLabel(Task):
    """An encoder that puts a text near its label; the loss is the cross-entropy of the cosines, times 20.

    Args:
        tuned: the encoder.
        tokenizer: its tokenizer.
        label_vectors: unit vectors with shape ``(labels, d)``.
        part_of: as ``DataSet.part_of``.
    """

    label_vectors: torch.Tensor
    part_of: torch.Tensor

    def __init__(
        self,
        tuned: Tuned,
        tokenizer: PreTrainedTokenizerBase,
        label_vectors: torch.Tensor,
        part_of: Sequence[int],
    ) -> None:
        super().__init__(tuned)
        self._tokenizer = tokenizer
        self.register_buffer("label_vectors", label_vectors)
        self.register_buffer("part_of", torch.tensor(part_of))

    def collate(self, rows: Sequence[Labelled]) -> dict[str, torch.Tensor]:
        """Ids and mask with shape ``(rows, seq)``, labels with shape ``(rows,)``."""
        ids, mask = _encode(self._tokenizer, [row.text for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row.label for row in rows])}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean loss of a batch that ``collate`` made."""
        scores = self._scores(input_ids, attention_mask, labels)
        return {"loss": functional.cross_entropy(scores, labels)}

    @torch.inference_mode()
    def scores(self, rows: Sequence[Labelled]) -> torch.Tensor:
        """Cosines times 20, ``(rows, labels)``."""
        batch = self.collate(rows)
        return self._scores(*(batch[name].to(self.device) for name in ("input_ids", "attention_mask", "labels")))

    def _scores(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cosines times 20, ``-inf`` for labels of other parts than a row's own."""
        others = self.part_of[labels].unsqueeze(1) != self.part_of
        return (_COSINE_SCALE * self._cosines(ids, mask)).masked_fill(others, float("-inf"))

    def _cosines(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embeds, wide_mask = self.tuned.embed(ids, mask)
        hidden = self.tuned.base(inputs_embeds=embeds, attention_mask=wide_mask).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return _unit_mean(hidden[:, self.tuned.soft_tokens :].float(), mask) @ self.label_vectors.T


@torch.no_grad()
def embed_labels(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataSet) -> torch.Tensor:
    """Unit vectors of the label texts by the untouched encoder, float32 with shape ``(labels, d)``."""
    ids, mask = _encode(tokenizer, list(data.labels))
    ids, mask = ids.to(base.device), mask.to(base.device)
    return _unit_mean(base(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on the right."""
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def _unit_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of a text, scaled to length 1; ``(batch, seq, d)`` to ``(batch, d)``."""
    weights = mask.unsqueeze(2).to(hidden.dtype)
    return functional.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
