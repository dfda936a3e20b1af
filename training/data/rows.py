"""Training rows: text-to-text rows of a file, and their token ids.

A row is its prompt, its completion and the end token, as plain text. A deployment tokenizes the same prompt to the same
ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adalink.runtime.errors import DataError, ModelError, RequestError
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import Row, origin_of, read_table
from adalink.runtime.storage.label_spec import LabelSet, fault_in_labels
from adalink.runtime.text.messages import check_conversation, images_of
from adalink.training.models.loading import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adalink.runtime.storage.vision_schema import PromptForm

_EXPECTED = '{"prompt": "...", "completion": "..."}'
_FIELDS = ("prompt", "completion", "images")
_REFUSED = ("videos", "audio", "audios")
# Completions are labels where there are few of them, each of several rows.
_MOST_LABELS, _FEWEST_ROWS = 100, 4


class TrainingRow(msgspec.Struct, frozen=True, eq=False):
    """One row of a file. Rows are equal where their content is, wherever they stand.

    Attributes:
        prompt: the prompt; empty for a conversation.
        completion: what is learned.
        images: paths relative to the file's folder.
        messages: a conversation before its reply, which is ``completion``, as JSON.
        line: its place in the file; 0 for a row of no file.
    """

    prompt: str
    completion: str
    images: tuple[str, ...] = ()
    messages: str | None = None
    line: int = 0

    @property
    def content(self) -> dict[str, Any]:
        """All but the place."""
        conversation = {} if self.messages is None else {"messages": self.messages}
        return {"prompt": self.prompt, "completion": self.completion, "images": self.images, **conversation}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingRow) and self.content == other.content

    def __hash__(self) -> int:
        return hash((self.prompt, self.completion, self.images, self.messages))


@dataclass(frozen=True)
class Example:
    """Token ids of one row; ``target`` ends with the end token; ``where`` is its file and place.

    The prompt has one placeholder for each position of an image.
    """

    prompt: list[int]
    target: list[int]
    images: tuple[Path, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class ImageTokens:
    """Tokens of images in a prompt.

    Attributes:
        token_id: the placeholder.
        image_tokens: tokens of an image file, which replace its one placeholder in a row.
    """

    token_id: int
    image_tokens: Callable[[Path], list[int]]


def read_rows(source: str | Path | RowSource) -> list[TrainingRow]:
    """Read rows with ``prompt`` and ``completion``, optionally ``images``; or ``messages``, the last one the reply.

    The file has any form that ``adalink.runtime.rows.table`` reads. Other columns are not used, but one whose name is
    nearly that of a column which the row lacks is refused.

    Raises:
        DataError: the file is missing, has no row, or a row has another form; the message names the place.
    """
    return [_training_row(row) for row in read_table(source, _EXPECTED)]


def _training_row(row: Row) -> TrainingRow:
    """A row; raises ``DataError``."""
    fields = row.fields
    for name in _REFUSED:
        if name in fields:
            raise DataError(f"{row.origin}: {name} cannot be learned from, images can: remove the column")
    row.extras(_FIELDS if "messages" not in fields or "prompt" in fields else ("messages", "images"))
    if "messages" in fields and "prompt" not in fields:
        return _conversation(row)
    if "prompt" not in fields and "text" in fields and "label" in fields:
        raise DataError(
            f"{row.origin}: text and label, expected {_EXPECTED}: say how a prompt is made of them, such as "
            "--template 'Text: {text} Topic:'"
        )
    prompt, completion = row.text("prompt", _EXPECTED), row.text("completion", _EXPECTED)
    if not prompt or not completion:
        raise DataError(f"{row.origin}: an empty prompt or completion: both need text; remove the row")
    try:
        images = msgspec.convert(fields.get("images") or [], tuple[str, ...])
    except msgspec.ValidationError as error:
        raise DataError(f"{row.origin}: images: {error}; expected a list of paths") from error
    return TrainingRow(prompt, completion, images, line=row.line)


def _conversation(row: Row) -> TrainingRow:
    """A conversation whose last message is the reply to learn; raises ``DataError``."""
    try:
        messages = check_conversation(row.fields["messages"])
    except RequestError as error:
        raise DataError(f"{row.origin}: {error}") from error
    reply = messages[-1]
    if reply["role"] != "assistant" or not isinstance(reply.get("content"), str) or not reply["content"].strip():
        raise DataError(
            f"{row.origin}: the last message is {reply.get('role')}'s, expected the assistant's with a text, which is "
            "what is learned"
        )
    if len(messages) < 2 or images_of(messages):
        raise DataError(f"{row.origin}: expected a message before the reply, and texts alone in training rows")
    return TrainingRow("", reply["content"], messages=msgspec.json.encode(messages[:-1]).decode(), line=row.line)


def find_labels(rows: Sequence[TrainingRow]) -> LabelSet | None:
    """The labels of rows whose completions are labels: at most 100, of four rows each in the mean; else ``None``."""
    completions = sorted({row.completion for row in rows})
    is_few = len(completions) <= _MOST_LABELS and len(rows) >= _FEWEST_ROWS * len(completions)
    if not is_few or any(row.images or row.messages for row in rows):
        return None
    labels = LabelSet(completions=tuple(completions))
    return None if fault_in_labels(labels) else labels


def check_labels(rows: Sequence[TrainingRow], labels: LabelSet, origin: str | Path) -> None:
    """Check that completions are labels; raises ``DataError``."""
    known = set(labels.completions)
    for number, row in enumerate(rows, start=1):
        if row.completion not in known:
            place = row.line or number
            raise DataError(
                f"{origin}: row {place} has the completion {row.completion!r:.80}, expected one of the labels "
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
        where = origin_of(Path(origin), row.line) if row.line else f"{origin}: row {number}"
        if row.messages is not None:
            prompt = _encode_messages(row.messages, tokenizer, where)
        elif form is None:
            prompt = list(tokenizer(row.prompt)["input_ids"])
        else:
            text = form.format(row.prompt, len(row.images))
            prompt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        paths = _image_paths(row, prompt, images, where, Path(origin).parent)
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
                f"{where} has {len(prompt) + len(target)} tokens, expected at most {max_length}: "
                "shorten its prompt or raise --max-length"
            )
        examples.append(Example(prompt, target, paths, where))
    return examples


def _encode_messages(messages: str, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of a conversation up to the beginning of its reply, as a deployment has it; raises ``DataError``."""
    if not tokenizer.chat_template:
        raise DataError(f"{where} has messages, and the base has no chat template: give prompts and completions")
    try:
        text = tokenizer.apply_chat_template(msgspec.json.decode(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything
        raise DataError(f"{where}: the chat template refuses the messages: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
            place = example.where or f"{origin}: row {number}"
            raise DataError(
                f"{place} takes {length} positions{with_soft}, and {type(model).__name__} has {limit}: "
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
