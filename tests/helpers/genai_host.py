"""onnxruntime-genai as a program uses it, and the tokens that it must give: transformers behind the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

NEW = 12
ACTIVATIONS = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "identity": lambda x: x}


def greedy(model: Any, prompt: list[int], adapter: Any) -> list[int]:
    """The likeliest tokens of transformers, with the method written out; all is computed anew at each step."""
    tokens, ends = list(prompt), model.generation_config.eos_token_id
    with torch.no_grad():
        while len(tokens) < len(prompt) + NEW:
            embeds = model.get_input_embeddings()(torch.tensor([tokens]))
            if adapter is not None:
                weights = {name: torch.from_numpy(weight) for name, weight in adapter.weights.items()}
                hidden = embeds @ weights["text.down.weight"].T + weights.get("text.down.bias", 0)
                activated = ACTIVATIONS[adapter.config.activation](hidden)
                embeds = embeds + activated @ weights["text.up.weight"].T + weights.get("text.up.bias", 0)
            tokens.append(int(model(inputs_embeds=embeds).logits[0, -1].argmax()))
            if tokens[-1] == ends:
                break
    return tokens[len(prompt) :]


class Host:
    """onnxruntime-genai on a folder, as a program uses it."""

    def __init__(self, folder: Path) -> None:
        self._genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
        self.folder, self.model = folder, self._genai.Model(str(folder))

    def weights(self, task: str | None) -> dict[str, np.ndarray]:
        return load_file(self.folder / "tasks" / f"{task}.safetensors" if task else self.folder / "base.safetensors")

    def generate(self, prompt: list[int], weights: dict[str, np.ndarray]) -> list[int]:
        params = self._genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt) + NEW)
        generator = self._genai.Generator(self.model, params)
        for name, value in weights.items():
            generator.set_model_input(name, value)
        generator.append_tokens(prompt)
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens
