"""PEFT: LoRA of rank 16, not merged, in PyTorch. Kinds: ``lora`` (all linear layers), ``lora-attention``."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (imports are counted for no peer)

from benchmarks.peers import common, torch_loop


class PeftPeer(common.Peer):
    """The checkpoint in float32 with adapters loaded beside it."""

    packages = ("peft", "torch", "transformers")

    def __init__(self, settings: common.Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._prompt = settings.prompt
        self._weights = (self.folder(settings) / "model.safetensors").stat().st_size
        self._folder = settings.work / "models" / settings.kind
        self.adapters = len(list(self._folder.iterdir()))
        base = AutoModelForCausalLM.from_pretrained(self.folder(settings), dtype=torch.float32)
        self._model = PeftModel.from_pretrained(base, str(self._folder / "0"), adapter_name="0").eval()

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

    def swap(self, index: int) -> None:
        """See ``common.Peer``."""
        self._model.set_adapter(str(index))

    def load(self, index: int) -> None:
        """See ``common.Peer``."""
        self._model.load_adapter(str(self._folder / str(index)), adapter_name=str(index))

    def disk_bytes(self) -> int:
        """See ``common.Peer``."""
        return (self._folder / "0/adapter_model.safetensors").stat().st_size


if __name__ == "__main__":
    common.main(PeftPeer)
