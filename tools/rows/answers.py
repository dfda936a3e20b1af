"""Answers to rows of prompts: all are encoded and checked first, then run in batches."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from adalink.runtime.errors import RequestError
from adalink.tools.rows.prompt_rows import BadRows, PromptRow, with_extras

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.generation.sequence import Generation

_BATCH_ROWS = 8

# Four bytes a token: all rows are encoded before the first is answered.
TokenIds: TypeAlias = "array[int]"


def encode_rows(
    deployment: Deployment, rows: list[PromptRow], bad: BadRows, *, chat: bool = False, new_tokens: int | None = 0
) -> tuple[list[PromptRow], list[tuple[TokenIds, TokenIds]]]:
    """Rows that can be answered, and token ids and token types of each, before any is answered.

    Args:
        deployment: the deployment.
        rows: the rows.
        bad: takes rows that cannot be answered, or raises their error.
        chat: whether prompts go into the chat template.
        new_tokens: tokens that each row may generate.
    """
    good, encoded = [], []
    for row in rows:
        try:
            ids, types = _encode_row(deployment, row, chat)
            if row.line:
                deployment.check_prompt(ids, row.images, row.task, new_tokens)
        except RequestError as error:
            bad.add(row.line, RequestError(f"{row.origin}: {error}") if row.origin else error)
        else:
            good.append(row)
            encoded.append((array("i", ids), array("i", types)))
    return good, encoded


def _encode_row(deployment: Deployment, row: PromptRow, chat: bool) -> tuple[list[int], list[int]]:
    """Token ids and token types of a row; raises ``RequestError``."""
    tokenizer = deployment.tokenizer
    types: list[int] = []
    if row.messages is not None:
        if deployment.manifest.base.kind == "encoder":
            raise RequestError(f"{deployment.manifest.base.name} is an encoder: give texts, not messages")
        return tokenizer.encode_messages(row.messages, row.chat), types
    if row.text_pair is not None or deployment.manifest.base.kind == "encoder":
        ids, types = tokenizer.encode_pair(row.prompt, row.text_pair)
    elif chat:
        ids = tokenizer.encode_chat(row.prompt)
    else:
        ids = deployment.encode_prompt(row.prompt, row.task, len(row.images))
    if not ids:
        raise RequestError("the prompt has no tokens: give it some text")
    return ids, types


def generate_rows(
    deployment: Deployment,
    rows: list[PromptRow],
    ids: list[TokenIds],
    stream: Callable[[int, str], None] | None,
    settings: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """One result for each row, in order; rows of different tasks share a batch."""
    size = batch_rows(
        deployment, _BATCH_ROWS, [len(row) for row in ids], max((len(row.images) for row in rows), default=0)
    )
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        tasks, images = [row.task for row in batch], [row.images for row in batch]
        prompts = ids[start : start + size]
        try:
            if settings.get("structured") is None:
                plain = {name: value for name, value in settings.items() if name != "structured"}
                results = deployment.generate(prompts, images=images, tasks=tasks, stream=stream, **plain)
            else:
                results = _generate_structured(deployment, prompts, batch, stream, settings)
        except RequestError as error:
            origin = batch[0].origin
            raise RequestError(f"{origin} and on: {error}" if origin else str(error)) from error
        for row, result in zip(batch, results, strict=True):
            image_paths = {"images": list(map(str, row.images))} if row.images and row.messages is None else {}
            prompt = {"prompt": row.prompt} if row.messages is None else {"messages": row.messages}
            yield with_extras({**prompt, "task": row.task, **image_paths, **asdict(result)}, row.extras)


def _generate_structured(
    deployment: Deployment,
    prompts: list[TokenIds],
    rows: list[PromptRow],
    stream: Callable[[int, str], None] | None,
    settings: Mapping[str, Any],
) -> list[Generation]:
    """Results of rows whose texts must have a form, which ``generate`` does not take."""
    from adalink.runtime.generation.request import Request

    handles = [
        deployment.submit(Request(ids, images=row.images, task=row.task, choice=index, **settings))
        for index, (ids, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    for index, handle in enumerate(handles if stream is not None else ()):
        for piece in handle:
            assert stream is not None
            stream(index, piece.text)
    return [handle.result() for handle in handles]


def batch_rows(deployment: Deployment, most: int, lengths: Sequence[int], images: int = 0) -> int:
    """Rows of a batch that the engine takes.

    Args:
        deployment: the deployment.
        most: rows where the engine takes any number.
        lengths: token ids of each prompt.
        images: images of a prompt at most.
    """
    profile = deployment.profile
    if profile is None:
        return most
    base = deployment.manifest.base
    most = min(most, profile.batch.max)
    if base.bidirectional_prompt and lengths:  # such prompts go in at once
        positions = 0 if base.vision is None else images * (base.vision.tokens_per_image or 0)
        most = min(most, profile.logits_capacity // (max(lengths) + positions))
    return max(1, most)


def embed_rows(
    deployment: Deployment, rows: list[PromptRow], encoded: list[tuple[TokenIds, TokenIds]]
) -> Iterator[dict[str, Any]]:
    """The mean hidden state of each row, in order, shape ``(d,)``."""
    for row, (ids, types) in zip(rows, encoded, strict=True):
        outputs = deployment.run(
            input_ids=[ids.tolist()], images=[row.images], tasks=row.task, token_type_ids=[types.tolist()]
        )
        pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
        mean = outputs["last_hidden_state"][0].mean(axis=0).tolist()
        answer = {"prompt": row.prompt, **pair, "task": row.task, "tokens": len(ids), "mean": mean}
        yield with_extras(answer, row.extras)
