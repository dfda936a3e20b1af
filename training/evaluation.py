"""Exact-match accuracy: greedy generation until the end token, compared with the expected completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from adalink.training.data.rows import end_token
from adalink.training.models.loading import max_positions
from adalink.training.models.prefix_lm import prompt_inputs
from adalink.training.outcome import Reply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adalink.training.data.images import TrainingImages
    from adalink.training.data.rows import Example

# A batch and the indices of its prompts -> the batch with the base's other inputs, such as ``pixel_values``.
Join = Callable[["dict[str, torch.Tensor]", Sequence[int]], "dict[str, torch.Tensor]"]


def greedy_tokens(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    end: int,
    max_new_tokens: int,
    batch_size: int,
    join: Join = lambda batch, chosen: batch,
) -> list[list[int]]:
    """Continue each prompt greedily; a reply ends with the end token, or is cut at ``max_new_tokens``.

    Prompts are sorted by length, padded on the left and run in batches. ``join`` adds the base's inputs beside tokens,
    such as ``pixel_values``, for prompts of the given indices. Generation settings of the checkpoint, such as a penalty
    or beams, do not apply: accuracy is that of the likeliest tokens. A deployment applies some of them by default, and
    answers as here with ``SamplingParams(temperature=0, base_defaults=False)``.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(prompts[index]) for index in chosen)
        blanks = [length - len(prompts[index]) for index in chosen]
        ids = [[end] * blank + prompts[index] for blank, index in zip(blanks, chosen, strict=True)]
        mask = [[0] * blank + [1] * (length - blank) for blank in blanks]
        attention_mask = torch.tensor(mask, device=model.device)
        batch = {
            "input_ids": torch.tensor(ids, device=model.device),
            "attention_mask": attention_mask,
            **prompt_inputs(model, torch.ones_like(attention_mask, dtype=torch.bool)),
        }
        with _greedy_generation(model, end):
            output = model.generate(**join(batch, chosen), max_new_tokens=max_new_tokens)
        # A decoder's output begins with the prompt, an encoder-decoder's with its start token.
        skipped = 1 if model.config.is_encoder_decoder else length
        for index, row in zip(chosen, output[:, skipped:].tolist(), strict=True):
            replies[index] = row[: row.index(end) + 1] if end in row else row
    return replies


@contextmanager
def _greedy_generation(model: PreTrainedModel, end: int) -> Iterator[None]:
    """Let ``model`` generate greedily with a cache until the block ends; only its start token stays."""
    original = model.generation_config
    starts = (getattr(config, "decoder_start_token_id", None) for config in (original, model.config))
    # Replaced on the model, not passed to the call: generate would fill in missing settings from the model's own.
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=next((token for token in starts if token is not None), None),
    )
    try:
        yield
    finally:
        model.generation_config = original


def greedy_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    images: TrainingImages | None = None,
    *,
    prepended: int = 0,
) -> list[Reply]:
    """Greedy replies to examples: right if they are the expected text, spaces at its ends aside, and then end.

    Args:
        model: a base, with or without an adapter attached.
        tokenizer: tokenizer of the base.
        examples: encoded rows.
        batch_size: rows generated at once.
        images: image inputs of the examples, for a base that takes images.
        prepended: positions that the attached adapter puts before each row.
    """
    end = end_token(tokenizer)

    def answer(numbers: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        def with_images(batch: dict[str, torch.Tensor], chosen: Sequence[int]) -> dict[str, torch.Tensor]:
            return batch if images is None else images.join(batch, [examples[numbers[index]] for index in chosen])

        prompts = [examples[number].prompt for number in numbers]
        return greedy_tokens(model, prompts, end, max_new_tokens, batch_size, with_images)

    longest = max(len(example.target) for example in examples)
    limit = None if model.config.is_encoder_decoder else max_positions(model)
    # Rows without enough positions for the longest target are generated one by one, each up to its limit.
    max_new_tokens = [longest if limit is None else limit - prepended - len(example.prompt) for example in examples]
    unlimited = [number for number, steps in enumerate(max_new_tokens) if steps >= longest]
    replies = dict(zip(unlimited, answer(unlimited, longest), strict=True))
    for number, steps in enumerate(max_new_tokens):
        if steps < longest:
            (replies[number],) = answer([number], max(1, steps))
    return [_reply(tokenizer, replies[number], example.target, end) for number, example in enumerate(examples)]


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], target: list[int], end: int) -> Reply:
    ends = ids[-1] == end
    text, expected = (str(tokenizer.decode(some)).strip() for some in (ids[:-1] if ends else ids, target[:-1]))
    return Reply(text, ends and text == expected)


def share_right(replies: Sequence[Reply]) -> float:
    """Exact-match accuracy: the share of replies that are right."""
    return sum(reply.is_right for reply in replies) / len(replies)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    images: TrainingImages | None = None,
    *,
    prepended: int = 0,
) -> float:
    """Share of examples whose greedy reply is right; see ``greedy_replies``."""
    return share_right(greedy_replies(model, tokenizer, examples, batch_size, images, prepended=prepended))
