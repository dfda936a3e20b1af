"""Training rows: text-to-text rows from JSONL, their token ids, and batches of them.

A row is its prompt, its completion and the end token, as plain text. A deployment tokenizes the same prompt to the same
ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from adalink.runtime.errors import DataError, ModelError
from adalink.runtime.storage.jsonl import read_jsonl
from adalink.runtime.storage.label_spec import LabelSet, fault_in_labels
from adalink.training.models.loading import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adalink.runtime.storage.vision_schema import PromptForm

IGNORED_LABEL = -100
# Completions are labels where there are few of them, each of several rows.
_MOST_LABELS, _FEWEST_ROWS = 100, 4


class TrainingRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a JSONL file; ``images`` are paths relative to the file's folder."""

    prompt: str
    completion: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """Token ids of one row; ``target`` ends with the end token.

    The prompt has one placeholder for each position of an image.
    """

    prompt: list[int]
    target: list[int]
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of images in a prompt.

    Attributes:
        token_id: the placeholder.
        image_tokens: tokens of an image file, which replace its one placeholder in a row.
    """

    token_id: int
    image_tokens: Callable[[Path], list[int]]


def read_rows(path: str | Path) -> list[TrainingRow]:
    """Read rows ``{"prompt": str, "completion": str}``, optionally with ``"images": [path, ...]``; skip empty lines.

    Raises:
        DataError: the file is missing, has no row, or a line is not such a row; the message names the line.
    """
    rows = []
    decode = msgspec.json.Decoder(TrainingRow).decode
    for number, row in read_jsonl(Path(path), '{"prompt": "...", "completion": "..."}', decode):
        if not row.prompt or not row.completion:
            raise DataError(f"{path}:{number}: an empty prompt or completion: both need text; remove the row")
        rows.append(row)
    return rows


def find_labels(rows: Sequence[TrainingRow]) -> LabelSet | None:
    """The labels of rows whose completions are labels: at most 100, of four rows each in the mean; else ``None``."""
    completions = sorted({row.completion for row in rows})
    if len(completions) > _MOST_LABELS or len(rows) < _FEWEST_ROWS * len(completions) or any(r.images for r in rows):
        return None
    labels = LabelSet(completions=tuple(completions))
    return None if fault_in_labels(labels) else labels


def check_labels(rows: Sequence[TrainingRow], labels: LabelSet, origin: str | Path) -> None:
    """Check that completions are labels; raises ``DataError``."""
    known = set(labels.completions)
    for number, row in enumerate(rows, start=1):
        if row.completion not in known:
            raise DataError(
                f"{origin}: row {number} has the completion {row.completion!r:.80}, expected one of the labels "
                f"{str(labels.completions)[:80]}: they are given as they are in the rows, leading space included"
            )


def encode_rows(
    rows: Sequence[TrainingRow],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    origin: str | Path,
    images: ImageTokens | None = None,
    form: PromptForm | None = None,
) -> list[Example]:
    """Token ids of rows.

    Prompt and completion are tokenized separately, since a deployment tokenizes a prompt before its completion exists.

    Args:
        rows: rows from ``read_rows``.
        tokenizer: tokenizer of the base.
        max_length: maximum tokens of a row, end token included.
        origin: file of the rows, for messages; image paths are relative to its folder.
        images: tokens of images; ``None`` for a base that takes none.
        form: prompt form of the base; ``None`` for prompts as they are.

    Raises:
        DataError: a row is too long (rows are never truncated, as in a deployment), does not have one placeholder for
            each image, or names a missing image.
        ModelError: the tokenizer has no end token.
    """
    end = end_token(tokenizer)
    examples = []
    for number, row in enumerate(rows, start=1):
        if form is None:
            prompt = list(tokenizer(row.prompt)["input_ids"])
        else:
            text = form.format(row.prompt, len(row.images))
            prompt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        paths = _image_paths(row, prompt, images, f"{origin}: row {number}", Path(origin).parent)
        if images is not None:
            remaining = iter(paths)
            prompt = [
                token
                for text_token in prompt
                for token in (images.image_tokens(next(remaining)) if text_token == images.token_id else (text_token,))
            ]
        target = [*tokenizer(row.completion, add_special_tokens=False)["input_ids"], end]
        if len(prompt) + len(target) > max_length:
            raise DataError(
                f"{origin}: row {number} has {len(prompt) + len(target)} tokens, expected at most {max_length}: "
                "shorten its prompt or raise --max-length"
            )
        examples.append(Example(prompt, target, paths))
    return examples


def check_positions(examples: Sequence[Example], model: PreTrainedModel, prepended: int, origin: str | Path) -> None:
    """Refuse a row that has more tokens than the base has positions.

    Args:
        examples: encoded rows.
        model: the base.
        prepended: positions that the adapter puts before each row.
        origin: file of the rows, for messages.

    Raises:
        DataError: a row is too long; for an encoder-decoder, its prompt or its target is.
    """
    limit = max_positions(model)
    for number, example in enumerate(examples, start=1):
        prompt, target = prepended + len(example.prompt), len(example.target)
        length = max(prompt, target) if model.config.is_encoder_decoder else prompt + target
        if limit is not None and length > limit:
            with_soft = f", {prepended} of them the soft prompt's" if prepended else ""
            raise DataError(
                f"{origin}: row {number} takes {length} positions{with_soft}, and {type(model).__name__} has {limit}: "
                "shorten its prompt or remove the row"
            )


def _image_paths(
    row: TrainingRow, prompt: Sequence[int], images: ImageTokens | None, where: str, folder: Path
) -> tuple[Path, ...]:
    """Paths of a row's images; ``prompt`` has one placeholder for each."""
    if images is None:
        if row.images:
            raise DataError(f"{where} has images, which this base or command does not take: remove them")
        return ()
    count = sum(token == images.token_id for token in prompt)
    if count != len(row.images):
        raise DataError(
            f"{where} has {count} image placeholders (token {images.token_id}) in its prompt and {len(row.images)} "
            "images: write one placeholder for each image where it belongs"
        )
    paths = tuple(folder / name for name in row.images)
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{where}: image {missing[0]} is not there; expected a path from that file's folder")
    return paths


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a completion; raises ``ModelError`` if the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError("the tokenizer has no end-of-sequence token: a completion could never end")
    return tokenizer.eos_token_id


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
