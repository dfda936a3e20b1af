"""PyTorch eager. Kinds: ``base``, and ``adalink``: the kit's training code in front of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (imports are counted for no peer)

from benchmarks.peers import common, torch_loop


class TorchPeer(common.Peer):
    """The checkpoint in float32, one process."""

    packages = ("torch", "transformers", "adalink-kit")

    def __init__(self, settings: common.Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._prompt = settings.prompt
        self._weights = (self.folder(settings) / "model.safetensors").stat().st_size
        self._model = AutoModelForCausalLM.from_pretrained(self.folder(settings), dtype=torch.float32).eval()
        if settings.kind == "adalink":
            from adalink.training.storage import load_adapter

            load_adapter(settings.work / "deployment/tasks/task-00000", self._model)

    @staticmethod
    def folder(settings: common.Settings) -> Path:
        """See ``common.Peer``."""
        return settings.work / "models/hf"

    def prefill(self) -> None:
        """See ``common.Peer``."""
        torch_loop.prefill(self._model, self._prompt)

    def weight_bytes(self) -> int:
        """See ``common.Peer``."""
        return self._weights

    def generate(self, new_tokens: int) -> list[int]:
        """See ``common.Peer``."""
        return torch_loop.generate(self._model, self._prompt, new_tokens)


if __name__ == "__main__":
    common.main(TorchPeer)
