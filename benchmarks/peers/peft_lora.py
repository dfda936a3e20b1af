"""PEFT: LoRA of rank 16, not merged, in PyTorch. Kinds: ``lora`` (all linear layers), ``lora-attention``."""

from __future__ import annotations

from peft import PeftModel

from benchmarks.peers import common
from benchmarks.peers.torch_loop import TorchLoopPeer


class PeftPeer(TorchLoopPeer):
    """The checkpoint in float32 with adapters loaded beside it."""

    packages = ("peft", "torch", "transformers")

    def __init__(self, settings: common.Settings) -> None:
        super().__init__(settings)
        self._folder = settings.work / "models" / settings.kind
        self.adapters = len(list(self._folder.iterdir()))
        self._model = PeftModel.from_pretrained(self._model, str(self._folder / "0"), adapter_name="0").eval()

    def switch(self, index: int) -> None:
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
