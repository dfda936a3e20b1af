"""Prompts: one request's input, and several of them as one batch for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.generation.padding import pad
from adalink.runtime.tasks.adapter_mapping import AdapterMapping, combine
from adalink.runtime.tasks.kv_prefix import KvPrefix
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.vision.placeholders import ImageEmbeds


@dataclass(frozen=True, eq=False)
class Prompt:
    """A checked prompt, with the adapter that it began with: replacing the task does not affect it.

    Attributes:
        token_ids: its tokens, with a placeholder for every position of an image.
        task: its task's name; ``None`` for the base model.
        tasks: the adapter mapping of a batch of its task alone.
        images: embeddings of its images, in order.
        soft_prompt_tokens: positions of the task's soft prompt before it.
        max_new_tokens: most new tokens.
        kv_prefix: the task's KV prefix, before the soft prompt; ``None`` without.
    """

    token_ids: list[int]
    task: str | None
    tasks: AdapterMapping
    images: Sequence[ImageEmbeds]
    soft_prompt_tokens: int
    max_new_tokens: int
    kv_prefix: KvPrefix | None = None

    @property
    def read_length(self) -> int:
        """Positions that the engine reads: soft prompt and tokens."""
        return self.soft_prompt_tokens + len(self.token_ids)

    @property
    def length(self) -> int:
        """Positions that it takes in the model: the KV prefix, and those that are read."""
        return (0 if self.kv_prefix is None else len(self.kv_prefix)) + self.read_length


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts as the engine takes them.

    Attributes:
        inputs: the token ids as one padded array, with adapters and image embeddings.
        layout: positions after the soft prompts are prepended.
    """

    inputs: BatchInputs
    layout: SoftPromptLayout


def collate(prompts: Sequence[Prompt], pad_token_id: int, padding_side: str) -> PromptBatch:
    """One batch of several prompts, each with its own task.

    Args:
        prompts: at least one.
        pad_token_id: the padding token.
        padding_side: the engine's, ``"left"`` or ``"right"``.
    """
    ids, mask = pad([prompt.token_ids for prompt in prompts], pad_token_id, padding_side)
    tasks = combine([prompt.tasks for prompt in prompts])
    layout = SoftPromptLayout(mask, tasks.soft_prompts(len(mask)), padding_side)
    images = [prompt.images for prompt in prompts] if any(len(prompt.images) for prompt in prompts) else None
    return PromptBatch(BatchInputs(ids.astype(np.int64, copy=False), None, None, tasks, images), layout)
