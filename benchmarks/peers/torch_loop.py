"""The greedy loop of PyTorch's peers, with the least overhead around the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (imports are counted for no peer)

from benchmarks.peers import common


class TorchLoopPeer(common.Peer):
    """The checkpoint in float32, one process; subclasses put adapters into ``_model``."""

    def __init__(self, settings: common.Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._prompt = settings.prompt
        self._weights = (self.folder(settings) / "model.safetensors").stat().st_size
        base = AutoModelForCausalLM.from_pretrained(self.folder(settings), dtype=torch.float32)
        self._model: Any = base.eval()

    @staticmethod
    def folder(settings: common.Settings) -> Path:
        """See ``common.Peer``."""
        return settings.work / "models/hf"

    def prefill(self) -> None:
        """See ``common.Peer``."""
        with torch.inference_mode():
            self._model(torch.tensor([self._prompt]), use_cache=True)

    def generate(self, new_tokens: int) -> list[int]:
        """See ``common.Peer``; only the last position's scores are computed."""
        tokens: list[int] = []
        ids, cache = torch.tensor([self._prompt]), None
        with torch.inference_mode():
            for _ in range(new_tokens):
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                tokens.append(int(ids))
        return tokens

    def weight_bytes(self) -> int:
        """See ``common.Peer``."""
        return self._weights
