"""The greedy loop that PyTorch's peers share: no more around the model than it needs, so less than ``generate`` has."""

from __future__ import annotations

from typing import Any

import torch


def prefill(model: Any, prompt: list[int]) -> None:
    """Scores of every position."""
    with torch.inference_mode():
        model(torch.tensor([prompt]), use_cache=True)


def generate(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens after ``prompt``; only the last position's scores are computed."""
    tokens: list[int] = []
    ids, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(new_tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return tokens
